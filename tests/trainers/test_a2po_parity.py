"""A2POTrainer against TRL 1.16.0's for the same completions: values, loss, gradient norm and every metric of TRL's."""

import pytest
import torch
import trl.experimental.a2po as trl_a2po
from datasets import Dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.data.packing as packing
from support.resuming import assert_resumes
from support.rollouts import FixedRollout, color_prompts
from support.training import NOT_COMPARED, make_trainer

BASE = {
    "max_completion_length": 8,
    "per_device_train_batch_size": 4,
    "num_value_samples": 3,
    "learning_rate": 5e-3,
    "beta2": 0.05,
    "beta1": 0.7,
    "gradient_accumulation_steps": 1,
}


def has_vowels(completions, **_):
    """1 for some completions, 0 for the others; some prompts have none of the first."""
    return [float(sum(letter in "aeiou" for letter in text) > 1) for text in completions]


def fixed_generation(rollout, pad, count):
    """Stands in the place of a model's `generate`."""

    def generate(input_ids, attention_mask, generation_config, **_):
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(input_ids, attention_mask, strict=True)
            for _ in range(generation_config.num_return_sequences)
        ]
        completions = [torch.tensor(ids) for ids in rollout.completions(prompts)]
        padded = pad_sequence(completions, True, pad)
        return torch.cat((input_ids.repeat_interleave(generation_config.num_return_sequences, 0), padded), 1)

    return generate


@pytest.fixture
def make(model_path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)

    def make(module, folder=None, *, given=None, **settings):
        # TRL counts what stands behind a completion that has no end token.
        rollout = FixedRollout(tokenizer, ends=1.0)
        # TRL asks the tokenizer to pad on the left.
        monkeypatch.setattr(tokenizer, "padding_side", "left")
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        arguments = {
            "model": model,
            "reward_funcs": [has_vowels],
            "train_dataset": color_prompts(),
            "eval_dataset": color_prompts(16).select(range(12, 16)),
            "processing_class": tokenizer,
            **({"rollout_func": rollout} if module is trl_fast else {}),
            **(given or {}),
        }
        folder = folder or tmp_path / module.__name__
        trainer = make_trainer(module, folder, method="A2PO", arguments=arguments, **{**BASE, **settings})
        if module is trl_a2po:
            for own in (trainer.model, trainer.ref_model):
                monkeypatch.setattr(own, "generate", fixed_generation(rollout, tokenizer.pad_token_id, 3))
        return trainer

    return make


def assert_equal(make, ours=None, evaluates=False, **settings):
    logs, values = [], []
    for module in (trl_a2po, trl_fast):
        trainer = make(module, **settings, **((ours or {}) if module is trl_fast else {}))
        trainer.train()
        if evaluates:
            trainer.evaluate()
        logs.append(trainer.state.log_history)
        values.append(trainer)
    expected = sorted(values[0]._optimal_values.values())
    assert sorted(values[1].optimal_values._values.values()) == pytest.approx(expected, abs=1e-6)
    assert len(logs[0]) == len(logs[1])
    for theirs, got in zip(*logs, strict=True):
        assert [name for name in got if name in theirs] == list(theirs)
        for name, value in theirs.items():
            if not any(part in name for part in NOT_COMPARED):
                assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} at step {theirs.get('step')}"
    return logs[1]


def test_every_metric(make):
    logs = assert_equal(make, evaluates=True)
    assert all(log["v_star"] > 0 for log in logs[:-2]) and logs[1]["implicit_reward"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared_prefix", "packed", "padded"])
def test_layouts_and_all_prompts(name, make):
    assert_equal(make, ours={"batch_layout": name}, filter_all_incorrect=False, max_steps=4)


def test_prompts_without_a_reward_are_left_out(make):
    trainer = make(trl_fast, max_steps=-1, num_train_epochs=1)
    trainer.train()
    hopeless, prompts = trainer.optimal_values.hopeless, trainer.train_dataset["prompt_ids"]
    kept = [ids for ids in prompts if tuple(ids) not in hopeless]
    assert 0 < len(kept) < len(prompts) and trainer.state.global_step == -(-len(kept) // 4)
    with pytest.raises(ValueError, match="filter_all_incorrect=True leaves no prompt"):
        make(trl_fast, given={"reward_funcs": lambda completions, **_: [0.0] * len(completions)}).train()


def test_runs_go_on_from_their_checkpoints(make, tmp_path):
    def trainer(folder, **settings):
        given = {
            "peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            "rollout_func": None,
            "reward_funcs": lambda completion_ids, **_: [float(sum(ids) % 3 > 0) for ids in completion_ids],
        }
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, **settings}
        return make(trl_fast, folder, given=given, **settings)

    assert_resumes(trainer, tmp_path / "run", steps=(1, 3))


def test_bad_input(make, tmp_path):
    with pytest.raises(ValueError, match="the train dataset is a stream"):
        make(trl_fast, given={"train_dataset": color_prompts().to_iterable_dataset()})
    trainer = make(trl_fast, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="the value of a prompt of .* tokens is unknown"):
        trainer.evaluate(color_prompts(30).select([29]))
    for settings, message in (
        ({"beta1": 0}, "beta1: expected a finite number > 0"),
        ({"num_value_samples": 0}, "num"),
    ):
        with pytest.raises(ValueError, match=message):
            trl_fast.A2POConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    theirs = trl_a2po.A2POConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta2=0.1)
    assert trl_fast.A2POConfig.from_any(theirs).beta2 == 0.1


@pytest.mark.slow
def test_a_run_that_learns(make):
    def is_good(completion_ids, **_):
        return [float(sum(token % 3 == 0 for token in ids) > len(ids) / 2) for ids in completion_ids]

    rows = Dataset.from_list([{"prompt": f"What color is {number}?"} for number in range(100, 196)])
    given = {"rollout_func": None, "reward_funcs": is_good, "train_dataset": rows.select(range(64))}
    given["eval_dataset"] = rows.select(range(64, 96))
    settings = {"beta2": 0.05, "num_value_samples": 4, "filter_all_incorrect": False, "learning_rate": 3e-3}
    settings |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "max_steps": 200}
    trainer = make(trl_fast, given=given, lr_scheduler_type="constant", gradient_checkpointing=False, **settings)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert before < 0.4 and after > before + 0.3
