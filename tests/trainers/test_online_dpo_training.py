"""OnlineDPOTrainer beyond TRL's numbers: schedules, evaluation, checkpoints, bad input, runs that learn."""

import random

import pytest
import torch
import trl.experimental.online_dpo as trl_online_dpo
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.data.packing as packing
from support.image_rollouts import brightness, picture_prompts
from support.resuming import assert_resumes
from support.rollouts import FixedImageRollout, FixedRollout, brevity, color_prompts
from support.training import assert_same_logs, make_trainer
from support.vision_processors import tiny_processor
from trl_fast.rollout import Rollout

BASE = {"max_new_tokens": 4, "max_steps": 2, "gradient_accumulation_steps": 1}


def noise(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture
def make(model_path, tokenizer, tmp_path):
    def make(output_dir=None, *, given=None, **settings):
        arguments = {"model": model_path, "reward_funcs": noise, "train_dataset": color_prompts(), **(given or {})}
        return make_trainer(
            trl_fast, output_dir or tmp_path, method="OnlineDPO", arguments=arguments, **{**BASE, **settings}
        )

    return make


def test_beta_of_each_epoch(make):
    trainer = make(beta=[0.5, 0.25], max_steps=-1, num_train_epochs=3)
    trainer.train()
    betas = [log["beta"] for log in trainer.state.log_history if "beta" in log]
    assert betas == [0.5] * 3 + [0.25] * 6 and trainer.beta == 0.25


@pytest.mark.parametrize("unscored", [(0, 1), (1,)])
def test_a_pair_without_rewards_is_not_learned_from(unscored, make, tokenizer):
    def judge(completion_ids, **_):
        return [None if index in unscored else noise([ids])[0] for index, ids in enumerate(completion_ids)]

    losses = {}
    for name, rewards in (
        ("all", noise),
        ("some", judge),
        ("none", lambda completion_ids, **_: [None] * len(completion_ids)),
    ):
        given = {"reward_funcs": rewards, "rollout_func": FixedRollout(tokenizer)}
        trainer = make(given=given, max_steps=1, missing_eos_penalty=1.0)
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        losses[name] = trainer.state.log_history[0]["loss"]
        moved = any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
        assert moved == (name != "none")
    pairs = trainer.args.per_device_train_batch_size
    assert losses["none"] == 0 and losses["all"] == pytest.approx(0.6931, abs=1e-4)
    assert losses["some"] == pytest.approx(losses["all"] * (pairs - 1) / pairs, abs=1e-4)


def test_evaluation_and_prompts_of_messages(make):
    rows = [{"prompt": [{"role": "user", "content": f"Which color is {i}?"}], "shade": i} for i in range(6)]
    seen = []

    def judge(prompts, completions, shade, **_):
        seen.append((prompts, completions, shade))
        return [float(len(messages[0]["content"])) for messages in completions]

    given = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows), "reward_funcs": judge}
    trainer = make(given=given, per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    ((prompts, completions, shade),) = seen
    assert prompts[0] == prompts[1] == rows[0]["prompt"] and shade == [i // 2 for i in range(12)]
    assert all(messages[0]["role"] == "assistant" for messages in completions)
    assert metrics["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["eval_objective/scores_margin"] >= 0 and metrics["eval_objective/kl"] == pytest.approx(0, abs=1e-5)
    trainer.train()
    assert trainer.state.global_step == 2


def test_runs_go_on_from_their_checkpoints(make, tmp_path):
    def trainer(folder, **settings):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 5e-3, **settings}
        peft = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return make(folder, given={"peft_config": peft}, beta=[0.5, 0.1], **settings)

    assert_resumes(trainer, tmp_path / "run", steps=(1, 3))


def test_long_prompts_lose_their_beginning_in_the_update(make, tokenizer):
    longest = {}
    for limit in (10, None):
        trainer = make(given={"rollout_func": FixedRollout(tokenizer, longest=4)}, max_length=limit)
        rows = [trainer.train_dataset[index] for index in range(4)]
        update = trainer._prepare_inputs(rows)
        longest[limit] = update.batch.position_ids.max().item() + 1
        # The prompt's end stays: completions are scored from it on.
        assert len(update.batch.targets) == sum(update.group_sizes) and len(update.scores) == 8
    assert longest[10] == 10 < longest[None]


def test_pairs_of_prompts_that_begin_alike_share_them(make, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    trainer = make(given={"rollout_func": FixedRollout(tokenizer, longest=4)}, batch_layout="shared_prefix")
    rows = [trainer.train_dataset[index] for index in (0, 3, 1, 4)]
    update = trainer._prepare_inputs(rows)
    alone = sum(len(row["prompt_ids"]) for row in rows)
    assert update.batch.input_ids.numel() < alone + len(update.batch.targets)
    assert len(update.group_sizes) == 4 and sum(update.group_sizes) == len(update.batch.targets)


class Engine:
    """Generates the same token over and over, and remembers how it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompt_ids, settings):
        self.asked.append((prompt_ids, settings))
        return Rollout(prompt_ids, [[5 + index % 2] for index in range(len(prompt_ids))])

    def sync_weights(self, model, step):
        pass


def test_sampling_follows_the_arguments(make):
    engine = Engine()
    trainer = make(given={"rollout_engine": engine}, top_k=3, max_new_tokens=6)
    trainer.train()
    (prompt_ids, settings), _ = engine.asked
    assert prompt_ids[0::2] == prompt_ids[1::2] and len(prompt_ids) == 8
    assert (settings.max_completion_length, settings.temperature, settings.top_k) == (6, 0.9, 3)
    assert make(max_completion_length=3).args.max_new_tokens == 3


def test_config_of_trl_is_taken(tmp_path):
    theirs = trl_online_dpo.OnlineDPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=[0.2, 0.1], loss_type="ipo", max_new_tokens=7
    )
    ours = trl_fast.OnlineDPOConfig.from_any(theirs)
    names = (
        "beta",
        "loss_type",
        "max_new_tokens",
        "max_length",
        "temperature",
        "learning_rate",
        "missing_eos_penalty",
    )
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    defaults = trl_online_dpo.OnlineDPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    own = trl_fast.OnlineDPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    others = {"logging_nan_inf_filter", "data_seed", "logging_steps"}
    different = {
        name
        for name, value in defaults.to_dict().items()
        if name not in others and own.to_dict().get(name, value) != value
    }
    assert different == set()


BAD_SETTINGS = [
    ({"max_new_tokens": 512}, "max_new_tokens=512 leaves no token of the prompt in max_length=512"),
    ({"loss_type": "hinge"}, "loss_type='hinge'"),
    ({"beta": []}, "beta"),
    ({"beta": [0.1, 0.0]}, "beta: expected a list of finite numbers > 0"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty: expected a finite number >= 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        trl_fast.OnlineDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_bad_arguments(make, model_path, tokenizer):
    with pytest.raises(ValueError, match="reward_funcs"):
        make(given={"reward_funcs": None})
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with pytest.raises(ValueError, match="ref_model is the very object of model"):
        make(given={"model": model, "ref_model": model, "processing_class": tokenizer})
    with pytest.raises(NotImplementedError, match="judge: TRL dropped judges in 0.28"):
        make(given={"judge": object()})
    masked = make(given={"rollout_func": FixedRollout(tokenizer, longest=3, with_mask=True), "reward_funcs": brevity})
    with pytest.raises(ValueError, match="env_mask cannot be used with OnlineDPOTrainer"):
        masked.train()


def test_a_reward_model_under_its_older_names(make, reward_model_path, caplog):
    with pytest.warns(FutureWarning, match="`reward_model` is a name of an older TRL"):
        trainer = make(given={"reward_funcs": None, "reward_model": reward_model_path})
    assert trainer.reward_funcs[0].config.num_labels == 1
    by_config = make(given={"reward_funcs": None, "compute_metrics": len}, reward_model_path=reward_model_path)
    assert by_config.reward_func_names == trainer.reward_func_names
    assert "compute_metrics is not used" in caplog.text


@pytest.mark.slow
def test_images_are_read_once_a_pair(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    logs = {}
    for layout in ("shared_prefix", "padded"):
        arguments = {
            "model": folders("qwen2_5_vl"),
            "reward_funcs": brightness,
            "train_dataset": picture_prompts(),
            "rollout_func": FixedImageRollout(tiny_processor("qwen2_5_vl")),
        }
        settings = {**BASE, "batch_layout": layout, "max_new_tokens": 8, "per_device_train_batch_size": 4}
        trainer = make_trainer(trl_fast, tmp_path / layout, method="OnlineDPO", arguments=arguments, **settings)
        assert trainer.updates.layout == layout
        trainer.train()
        logs[layout] = trainer.state.log_history
    assert_same_logs(logs["shared_prefix"], logs["padded"], rel=1e-3, abs=1e-4)


LEFT = {
    "_dist": "sharded weights are gathered by the engine",
    **dict.fromkeys(("_name", "_paper", "_template_file", "_tag_names"), "the model card is written otherwise"),
    **dict.fromkeys(("image_token", "image_token_id", "vision_start_token_id", "vision_end_token_id"), "no template"),
    "is_encoder_decoder": "decoders only",
    "stats": "metrics wait in _metrics",
}


def test_attributes_of_trls_trainer(make, tokenizer, model_path, tmp_path):
    ours = make()
    theirs = make_trainer(
        trl_online_dpo,
        tmp_path / "trl",
        method="OnlineDPO",
        arguments={
            "model": AutoModelForCausalLM.from_pretrained(model_path),
            "reward_funcs": noise,
            "train_dataset": color_prompts(),
            "processing_class": tokenizer,
        },
        **BASE,
    )
    public = {name for name in {*dir(theirs), *vars(theirs)} if not name.startswith("_")}
    missing = {name for name in public if not hasattr(ours, name)} - {"tokenize_row", "process_vision_row"}
    assert missing <= LEFT.keys()
    for name in (
        "beta",
        "max_length",
        "num_generations",
        "temperature",
        "top_p",
        "top_k",
        "eos_token_ids",
        "use_vllm",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.temperature = 0.5
    assert ours.loop.settings().temperature == 0.5


def is_good(token):
    return token % 3 == 0


def good_share(completion_ids, **_):
    return [sum(map(is_good, ids)) / len(ids) for ids in completion_ids]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_run_that_learns(loss_type, make):
    def prompts(count, seed):
        rng = random.Random(seed)
        return Dataset.from_list([{"prompt": f"What color is {rng.randrange(10**6)}?"} for _ in range(count)])

    given = {"train_dataset": prompts(512, 0), "eval_dataset": prompts(64, 1), "reward_funcs": good_share}
    trainer = make(
        given=given,
        loss_type=loss_type,
        beta=0.1,
        max_new_tokens=8,
        temperature=1.0,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        max_steps=150,
        gradient_checkpointing=False,
    )
    before = trainer.evaluate()["eval_objective/scores"]
    trainer.train()
    after = trainer.evaluate()["eval_objective/scores"]
    assert before < 0.4 and after > before + 0.2
    assert torch.tensor([log["rewards/accuracies"] for log in trainer.state.log_history[-6:-2]]).mean() > 0.5
