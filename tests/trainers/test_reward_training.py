"""Reward models that learn, and what saving, resuming and evaluating them gives."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trl_fast
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.model_changes import changes_of

COLORS = ("blue", "green", "red", "grey", "pink", "teal")
LORA = {"r": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
IDS = torch.tensor([[5, 6, 7, 8]])


def one_color_wins(count, first):
    """Of two colors, the one that stands earlier in COLORS is chosen; the number before it says nothing."""
    rows = []
    for number in range(first, first + count):
        better, worse = sorted((number % 6, (number + 1 + number // 6 % 5) % 6))
        rows.append({name: f"{number}: {COLORS[which]}" for name, which in (("chosen", better), ("rejected", worse))})
    return Dataset.from_list(rows)


def trainer_in(folder, model_path, arguments=None, **settings):
    given = {"model": model_path, "train_dataset": color_pairs(), **(arguments or {})}
    return make_trainer(trl_fast, folder, method="Reward", arguments=given, **settings)


@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole model", "LoRA"])
def test_accuracy_on_rows_not_trained_on_rises(peft, model_path, tmp_path):
    arguments = {"train_dataset": one_color_wins(240, 0), "eval_dataset": one_color_wins(60, 1000)}
    if peft:
        arguments["peft_config"] = LoraConfig(**LORA)
    trainer = trainer_in(
        tmp_path,
        model_path,
        arguments,
        max_steps=60,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=1e-2 if peft else 3e-3,
        logging_steps=20,
        gradient_checkpointing=False,
        center_rewards_coefficient=0.01,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.75
    assert after["eval_accuracy"] > 0.95 and after["eval_margin"] > 1
    assert after["eval_loss"] < 0.3 < before["eval_loss"]
    assert abs(after["eval_mean_reward"]) < 2


def losses(trainer):
    # A trainer state that was read from a file has its names sorted.
    return [dict(sorted(log.items())) for log in trainer.state.log_history if "loss" in log]


def test_a_resumed_run_of_an_adapter_goes_on_as_if_it_had_not_stopped(model_path, tmp_path):
    """tests/trainers/test_resume.py has the whole model."""

    def run(name, **settings):
        arguments = {"peft_config": LoraConfig(**LORA)}
        return trainer_in(tmp_path / name, model_path, arguments, max_steps=4, **settings)

    whole = run("whole")
    whole.train()
    run("parts", save_strategy="steps", save_steps=2).train()
    (tmp_path / "parts/checkpoint-4/trainer_state.json").unlink()
    resumed = run("parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same_logs(losses(resumed), losses(whole), rel=1e-6, abs=1e-7)
    for (name, got), (_, wanted) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name


def test_what_is_saved_loads_as_any_classifier(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1 and loaded.config.pad_token_id == trainer.processing_class.pad_token_id
    # Fused layers round otherwise.
    changes_of(trainer.model).undo_all()
    assert torch.equal(loaded(IDS).logits, trainer.model.eval()(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == trainer.processing_class.pad_token
    assert "Reward" in (tmp_path / "README.md").read_text()
    # What comes out is what went in: the next trainer starts from the trained head.
    again = trainer_in(tmp_path / "next", str(tmp_path))
    assert torch.equal(again.model.score.weight, trainer.model.score.weight)


def test_a_saved_adapter_brings_the_head(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path, {"peft_config": LoraConfig(**LORA)})
    trainer.train()
    trainer.save_model()
    fresh = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype="float32")
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


def test_evaluate_takes_datasets_that_were_not_prepared(model_path, tmp_path):
    trainer = trainer_in(tmp_path, model_path, {"eval_dataset": color_pairs(5)})
    expected = trainer.evaluate()
    assert_same_logs([trainer.evaluate(color_pairs(5))], [expected], rel=0, abs=0)
    again = trainer.evaluate({"few": color_pairs(5), "more": color_pairs(9)})
    assert again["eval_few_loss"] == expected["eval_loss"]
    assert again["eval_more_loss"] == trainer.evaluate(color_pairs(9))["eval_loss"]
