"""GRPO and RLOO as a person uses them: they sample, learn, log, save, and say what is wrong."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.rollout.vllm_engine as vllm_engine
from support.rollouts import FixedEngine, FixedRollout, brevity, color_prompts
from support.training import make_trainer
from trl_fast.rollout import RewardFunctions, Rollout

SETTINGS = {"num_generations": 4, "max_completion_length": 6, "gradient_accumulation_steps": 1}


def make(model_path, folder, reward=brevity, method="GRPO", dataset=None, **settings):
    names = ("rollout_func", "rollout_engine", "eval_dataset", "callbacks", "processing_class")
    given = {name: settings.pop(name) for name in names if name in settings}
    arguments = {
        "model": model_path,
        "reward_funcs": reward,
        "train_dataset": color_prompts() if dataset is None else dataset,
        **given,
    }
    settings = {"per_device_train_batch_size": 8, "max_steps": 2, **SETTINGS, **settings}
    return make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)


def share_of_spaces(completions, **_):
    return [text.count(" ") / max(len(text), 1) for text in completions]


@pytest.mark.parametrize("method", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_it_learns(method, model_path, tmp_path):
    settings = {"learning_rate": 3e-3, "max_steps": 60, "logging_steps": 10, "num_generations": 8}
    if method == "RLOO":
        settings["beta"] = 0.0
    trainer = make(model_path, tmp_path, share_of_spaces, method, per_device_train_batch_size=16, **settings)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[-1] > 2 * rewards[0]


def test_a_script_of_the_documentation(model_path, tmp_path, capsys):
    def reward_function(completions, **kwargs):
        return [len(completion.split()) for completion in completions]

    with pytest.warns(FutureWarning, match="max_new_tokens"):
        config = trl_fast.GRPOConfig(
            str(tmp_path), max_new_tokens=5, num_generations=4, max_steps=1, use_cpu=True, bf16=False,
            report_to="none", log_completions=True, num_completions_to_print=2, logging_steps=1,
        )  # fmt: skip
    assert config.max_completion_length == 5
    trainer = trl_fast.GRPOTrainer(
        model=model_path, reward_funcs=reward_function, args=config, train_dataset=color_prompts()
    )
    trainer.train()
    assert "completions at step 1" in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table) == ["step", "prompt", "completion", "reward_function", "advantage"] and len(table) == 8


def test_several_rewards_of_every_kind(model_path, tmp_path, reward_model_path):
    async def slow(completions, **_):
        return [float(len(text)) for text in completions]

    def picky(completions, shade, log_extra, log_metric, **_):
        log_extra("seen", list(shade))
        log_metric("longest", max(map(len, completions)))
        return [None] * len(completions)

    trainer = make(
        model_path, tmp_path, [slow, picky, reward_model_path], reward_weights=[0.5, 1.0, 2.0], log_completions=True
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/picky/mean"] is None and log["rewards/slow/mean"] > 0
    model = reward_model_path.rsplit("/", 1)[-1]
    assert log["reward"] == pytest.approx(0.5 * log["rewards/slow/mean"] + 2 * log[f"rewards/{model}/mean"], rel=1e-5)
    assert log["longest"] > 0
    assert "seen" in pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")


@pytest.mark.parametrize(("name", "module"), [("wandb", {"run": 1}), ("wandb", {"run": None}), ("trackio", {})])
def test_tables_of_completions(name, module, model_path, tmp_path, monkeypatch, capsys):
    def shaded(completions, shade, log_extra, **_):
        log_extra("hue", [{"of": value} for value in shade])
        return [float(len(text)) for text in completions]

    logged = []
    stand_in = SimpleNamespace(log=logged.append, Table=lambda dataframe: dataframe, **module)
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setenv("COLUMNS", "200")
    trainer = make(model_path, tmp_path, shaded, max_steps=1, log_completions=True, log_unique_prompts=True)
    trainer.args.report_to = [name]
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 8
    shown = capsys.readouterr().out
    assert "hue" in shown and all(str(hue) in shown for hue in table["hue"])
    # After the step and at the end; where no run is open, nowhere.
    assert len(logged) == 2 * (module != {"run": None})
    for entry in logged:
        assert len(entry["completions"]) == entry["completions"]["prompt"].nunique() == 2


def test_conversations(model_path, tmp_path):
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": f"What color is {i}?"}]} for i in range(8)]
    make(model_path, tmp_path, reward, dataset=Dataset.from_list(rows), max_steps=1).train()
    assert all(completion[0]["role"] == "assistant" for _, completion in seen)
    assert all(prompt[0]["content"].startswith("What color") for prompt, _ in seen)


def test_a_stream(model_path, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(color_prompts(20)))
    trainer = make(model_path, tmp_path, dataset=stream, shuffle_dataset=False, max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert [row["shade"] for row in batch] == [0] * 4 + [1] * 4
    trainer.train()


def test_resumed_training_is_the_same(model_path, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    whole = make(model_path, tmp_path / "whole", **settings)
    whole.train()
    resumed = make(model_path, tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-2")
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name
    assert resumed.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_that_came_with_the_model_is_copied_where_there_is_a_kl(beta, model_path, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    trainer = make(model, tmp_path, beta=beta, max_steps=1)
    assert ("ref" in trainer.model.peft_config) == (beta != 0)
    trainer.train()


def test_equal_rewards_change_nothing(model_path, tmp_path):
    trainer = make(model_path, tmp_path, lambda completions: [1.0] * len(completions), learning_rate=1.0)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1
    assert trainer.state.log_history[0]["grad_norm"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_a_reward_function_that_fails_loses_nothing(model_path, tmp_path):
    calls = []

    def fragile(completions):
        calls.append(None)
        if len(calls) == 3:
            raise KeyError("solution")
        return [float(len(text)) for text in completions]

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    trainer = make(model_path, tmp_path, fragile, **settings)
    with pytest.raises(RuntimeError, match="fragile") as failure:
        trainer.train()
    assert "checkpoint" in failure.value.__notes__[0]
    resumed = make(model_path, tmp_path, fragile, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions: [1.0], "1"),
        (lambda completions: ["good"] * len(completions), "good"),
        (lambda completions: [float("nan")] * len(completions), "nan"),
    ],
)
def test_rewards_that_are_none(reward, message, model_path, tmp_path):
    with pytest.raises(ValueError, match=f"lambda.*{message}"):
        make(model_path, tmp_path, reward).train()


class Engine:
    """An engine that returns what it was given."""

    def __init__(self, completion_ids):
        self.completion_ids = completion_ids

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, self.completion_ids(prompt_ids))

    def sync_weights(self, model, step):
        pass


@pytest.mark.parametrize(
    ("completion_ids", "message"),
    [
        (lambda prompts: [[]] * len(prompts), "completion_ids are empty for the prompt 'What color"),
        (lambda prompts: [[3]], "1 completion_ids for 8 prompts"),
        (lambda prompts: [[10**6]] * len(prompts), "outside of the"),
    ],
)
def test_rollouts_that_are_none(completion_ids, message, model_path, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(model_path, tmp_path, rollout_engine=Engine(completion_ids)).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 3}, "num_generations=3 does not divide the 8 completions"),
        ({"num_generations": 1}, "num_generations: expected an integer >= 2, got 1"),
        ({"generation_batch_size": 12}, "generation_batch_size=12 is no multiple"),
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown"),
        ({"scale_rewards": "all"}, "scale_rewards='all' is unknown"),
        ({"temperature": 0.0}, "temperature: .*got 0.0"),
        ({"max_completion_length": 0}, "max_completion_length: .*got 0"),
        ({"top_entropy_quantile": -0.1}, "top_entropy_quantile: .*got -0.1"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"max_completion_length": 300}, "the longest prompt of the train dataset has .* 256 positions"),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 6}, "num_generations_eval=4 does not divide the 6"),
    ],
)
def test_settings_that_cannot_be(settings, message, model_path, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(model_path, tmp_path, **settings)


def test_an_evaluation_by_hand_that_would_cut_groups_apart(model_path, tmp_path):
    trainer = make(model_path, tmp_path, eval_dataset=color_prompts(4), per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match="num_generations_eval=4 does not divide the 6.*per_device_eval_batch_size=6"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "What?"}], "expected 'prompt'"),
        ([{"prompt": 3}], "row 0, column 'prompt': 3"),
        ([{"prompt": "What?", "image": "x"}], "has images, which LlamaForCausalLM does not read"),
        ([], "no rows"),
    ],
)
def test_data_that_cannot_be(rows, message, model_path, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(model_path, tmp_path, dataset=Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": []}))


def test_what_is_not_supported_says_so(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="reward_funcs"):
        make(model_path, tmp_path, None)


def test_a_rollout_function_without_what_is_needed(model_path, tmp_path, tokenizer):
    def broken(prompts, trainer):
        output = FixedRollout(tokenizer)(prompts, trainer)
        del output["logprobs"]
        return output

    with pytest.raises(ValueError, match="rollout_func returned .* expected logprobs too"):
        make(model_path, tmp_path, rollout_func=broken).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": lambda rows: rows[:-1]}, "7 logprobs for 8 prompts"),
        (
            {"logprobs": lambda rows: [*rows[:-1], rows[-1] + [-1.0]]},
            "logprobs for the prompt 'What color .* values",
        ),
        ({"env_mask": lambda rows: [row[1:] for row in rows]}, "env_mask.* for the prompt 'What color is .* values"),
    ],
)
def test_a_rollout_function_whose_lists_do_not_fit(changes, message, model_path, tmp_path, tokenizer):
    def broken(prompts, trainer):
        output = FixedRollout(tokenizer, with_mask=True)(prompts, trainer)
        return {**output, **{name: change(output[name]) for name, change in changes.items()}}

    with pytest.raises(ValueError, match=message):
        make(model_path, tmp_path, rollout_func=broken).train()


def test_a_rollout_function_has_the_engine_with_the_steps_weights(model_path, tmp_path, tokenizer, monkeypatch):
    class Synced(FixedEngine):
        steps = ()

        def sync_weights(self, model, step):
            self.steps += (step,)

    def roll_out(prompts, trainer):
        found = trainer.engine.generate(tokenizer(text=prompts)["input_ids"], trainer.args.sampling_settings())
        logprobs = [[-1.0] * len(ids) for ids in found.completion_ids]
        return {"prompt_ids": found.prompt_ids, "completion_ids": found.completion_ids, "logprobs": logprobs}

    monkeypatch.setattr(vllm_engine, "make_vllm_engine", lambda *_: Synced(tokenizer))
    trainer = make(model_path, tmp_path, rollout_func=roll_out, use_vllm=True)
    trainer.train()
    assert trainer.engine.steps == (0, 1)


def test_the_engine_the_rollout_function_and_arguments_can_be_exchanged_later(model_path, tmp_path, tokenizer):
    trainer, engine = make(model_path, tmp_path, max_steps=1), FixedEngine(tokenizer)
    trainer.engine = engine
    rows = [{"prompt": "the sky", "prompt_ids": tokenizer("the sky")["input_ids"], "shade": 1}] * 4
    assert trainer.engine is engine
    expected = FixedEngine(tokenizer).generate([row["prompt_ids"] for row in rows], None).completion_ids
    assert trainer.make_samples(rows).completion_ids == expected
    lists = {"prompt_ids": [[5]] * 4, "completion_ids": [[6, 7]] * 4, "logprobs": [[-1.0, -1.0]] * 4}
    trainer.rollout_func = lambda prompts, owner: lists if owner is trainer else None
    for trainer.args.mask_truncated_completions in (True, False):
        samples = trainer.make_samples(rows)
        assert samples.completion_ids == [[6, 7]] * 4
        assert samples.excluded.tolist() == [trainer.args.mask_truncated_completions] * 4
    assert tokenizer.eos_token_id in trainer.end_ids


def test_reward_functions_can_be_exchanged_later(model_path, tmp_path, tokenizer):
    trainer, asked = make(model_path, tmp_path, max_steps=1), []

    def recorded(completions, **_):
        asked.extend(completions)
        return [float(number) for number in range(len(completions))]

    trainer.reward_functions = RewardFunctions(recorded)
    assert trainer.reward_functions.names == ["recorded"]
    trainer.train()
    assert asked and trainer.state.log_history[0]["reward"] > 0
