"""DistillationTrainer and GKDTrainer against TRL 1.16.0's: loss, gradient norm and every logged metric."""

import pytest
import torch
import trl
import trl.experimental.gkd as trl_gkd
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

import trl_fast
from support.image_rollouts import picture_prompts
from support.rollouts import FixedImageRollout, FixedRollout, color_prompts
from support.training import NOT_COMPARED, assert_same_logs, make_trainer
from support.vision_processors import tiny_processor

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

BASE = {"max_completion_length": 8, "max_steps": 2, "temperature": 0.8}


def logs_of(module, folder, arguments, settings, evaluates=False):
    trainer = make_trainer(module, folder, method="Distillation", arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    return [{name: value for name, value in logs.items() if name != "step_time"} for logs in trainer.state.log_history]


@pytest.fixture
def compare(tmp_path, model_path, teacher_path, tokenizer, monkeypatch):
    def run(*, peft=None, evaluates=False, teacher=None, ours=None, **settings):
        rollout, settings = FixedRollout(tokenizer), {**BASE, **settings}
        fixed = lambda trainer, ids, *_, **__: rollout.completions(ids)  # noqa: E731
        monkeypatch.setattr(trl.DistillationTrainer, "_generate_single_turn", fixed)

        def arguments():
            return {
                "model": model_path,
                "teacher_model": teacher or teacher_path,
                "train_dataset": color_prompts(),
                "eval_dataset": color_prompts(4),
                "peft_config": LoraConfig(**peft) if peft else None,
            }

        expected = logs_of(trl, tmp_path / "trl", arguments(), settings, evaluates)
        given = {**arguments(), "rollout_func": FixedRollout(tokenizer)}
        got = logs_of(trl_fast, tmp_path / "ours", given, {**settings, **(ours or {})}, evaluates)
        assert_same_logs(got, expected)
        return got

    return run


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_every_divergence(beta, compare):
    losses = [logs["loss"] for logs in compare(beta=beta, evaluates=beta == 0.5) if "loss" in logs]
    assert min(losses) > 1e-3


SETTINGS = {
    "one micro-batch": {"gradient_accumulation_steps": 1, "max_steps": 3},
    "four of them": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.5},
    "warm": {"temperature": 1.7, "beta": 0.3, "learning_rate": 1e-2},
    "in order": {"shuffle_dataset": False, "beta": 0.0},
}


# Those of the default tests.
QUICK = ("one micro-batch", "four of them")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]


@pytest.mark.parametrize("name", CASES)
def test_settings(name, compare):
    compare(**SETTINGS[name])


def test_layouts(main_layout, compare):
    compare(ours={"batch_layout": main_layout}, beta=0.5)


def test_a_teacher_of_another_width(wider_teacher_path, compare):
    compare(teacher=wider_teacher_path, beta=0.5)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], pytest.param("all-linear", marks=pytest.mark.slow)])
def test_lora(modules, compare):
    compare(peft={"r": 4, "target_modules": modules, "task_type": "CAUSAL_LM"}, learning_rate=1e-2, evaluates=True)


# ---- GKD


def conversations(count=16):
    """Questions with answers of different lengths."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"What color is {i}?"},
                    {"role": "assistant", "content": f"It is blue {i * 7}" * (1 + i % 3)},
                ]
            }
            for i in range(count)
        ]
    )


def gkd_logs(module, folder, arguments, settings):
    trainer = make_trainer(module, folder, method="GKD", arguments=arguments, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


@pytest.mark.parametrize("beta", [0.5, *(pytest.param(beta, marks=pytest.mark.slow) for beta in (0.0, 1.0))])
def test_gkd_on_given_completions(beta, model_path, teacher_path, tokenizer, tmp_path):
    logs = {}
    for module in (trl_gkd, trl_fast):
        arguments = {
            "model": model_path,
            "teacher_model": teacher_path,
            "train_dataset": conversations(),
            "eval_dataset": conversations(4),
            "processing_class": tokenizer,
        }
        settings = {"beta": beta, "lmbda": 0.0, "max_steps": 2, "max_length": 64, "max_grad_norm": 0.5}
        logs[module] = gkd_logs(module, tmp_path / module.__name__, arguments, settings)
    _same_where_trl_logs(logs[trl_fast], logs[trl_gkd])
    assert logs[trl_fast][0]["loss"] > 1e-3


def test_gkd_on_sampled_completions(model_path, teacher_path, tokenizer, tmp_path, monkeypatch):
    """TRL divides the loss by the tokens of the dataset's completions; here the sampled ones have as many."""
    rows, rollout = conversations(8), FixedRollout(tokenizer, longest=9, ends=0.0)
    answers = {}

    class Sampled:
        """A rollout as long as the dataset's completions, from which TRL counts."""

        def generate(self, prompt_ids, settings):
            return trl_fast.rollout.Rollout(prompt_ids, [answers[tuple(ids)] for ids in prompt_ids])

        def sync_weights(self, model, step):
            pass

    trainer = make_trainer(
        trl_fast,
        tmp_path / "ours",
        method="GKD",
        arguments={
            "model": model_path,
            "teacher_model": teacher_path,
            "train_dataset": rows,
            "processing_class": tokenizer,
            "rollout_engine": Sampled(),
        },
        lmbda=1.0,
        max_steps=2,
        beta=0.5,
        learning_rate=1e-2,
    )
    for row in trainer.train_dataset:
        sampled = (rollout.completions([row["prompt_ids"]])[0] * 40)[: len(row["completion_ids"])]
        answers[tuple(row["prompt_ids"])] = sampled
    trainer.train()
    theirs = _trl_on(answers, model_path, teacher_path, tokenizer, rows, tmp_path, monkeypatch)
    _same_where_trl_logs(trainer.state.log_history, theirs)


def _trl_on(answers, model_path, teacher_path, tokenizer, rows, tmp_path, monkeypatch):
    """Returns the logs of TRL's GKD on completions by prompt."""

    def outputs(model, inputs, generation_config):
        prompts, masks = inputs["prompts"], inputs["prompt_attention_mask"]
        found = [answers[tuple(ids[mask.bool()].tolist())] for ids, mask in zip(prompts, masks, strict=True)]
        width = max(map(len, found))
        completions = prompts.new_zeros(len(found), width)
        present = prompts.new_zeros(len(found), width)
        for row, ids in enumerate(found):
            completions[row, : len(ids)] = prompts.new_tensor(ids)
            present[row, : len(ids)] = 1
        input_ids = prompts.new_zeros(len(found), prompts.shape[1] + width)
        input_ids[:, : prompts.shape[1]], input_ids[:, prompts.shape[1] :] = prompts, completions
        attention = masks.new_zeros(input_ids.shape)
        attention[:, : prompts.shape[1]], attention[:, prompts.shape[1] :] = masks, present
        labels = input_ids.masked_fill(attention == 0, -100)
        labels[:, : prompts.shape[1]] = -100
        return input_ids, attention, labels

    monkeypatch.setattr(trl_gkd.GKDTrainer, "generate_on_policy_outputs", staticmethod(outputs))
    arguments = {
        "model": model_path,
        "teacher_model": teacher_path,
        "train_dataset": rows,
        "processing_class": tokenizer,
    }
    settings = {"lmbda": 1.0, "max_steps": 2, "beta": 0.5, "learning_rate": 1e-2}
    trainer = make_trainer(trl_gkd, tmp_path / "trl", method="GKD", arguments=arguments, **settings)
    trainer.train()
    return trainer.state.log_history


def _same_where_trl_logs(got, expected):
    """Holds every value that TRL logs; ours also logs the completions' lengths, and the entropy."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            if not any(part in name for part in NOT_COMPARED):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} at step {theirs.get('step')}"


# ---- images


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_prompts_with_images(family, folders, tmp_path, monkeypatch):
    model, processor = folders(family), tiny_processor(family)
    teacher = AutoModelForImageTextToText.from_pretrained(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    rollout = FixedImageRollout(processor)
    fixed = lambda trainer, ids, *_, **__: rollout.completions(ids)  # noqa: E731
    monkeypatch.setattr(trl.DistillationTrainer, "_generate_single_turn", fixed)

    def arguments():
        return {
            "model": model,
            "teacher_model": str(tmp_path / "teacher"),
            "train_dataset": picture_prompts().remove_columns("shade"),
        }

    settings = {**BASE, "beta": 0.5, "adam_epsilon": 1e-2, "gradient_accumulation_steps": 1}
    expected = logs_of(trl, tmp_path / "trl", arguments(), settings)
    given = {**arguments(), "rollout_func": FixedImageRollout(processor)}
    assert_same_logs(logs_of(trl_fast, tmp_path / "ours", given, settings), expected)
    assert expected[0]["loss"] > 1e-4
