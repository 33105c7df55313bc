"""DPO on pairs whose prompts have images, against TRL: loss, gradient norm and metrics of several steps."""

from __future__ import annotations

import pytest
import trl
from datasets import Dataset

import trl_fast
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor

STEPS = 3
SHOWN = pictures(7)


def message(role, content):
    return [{"role": role, "content": content}]


def rows():
    """A prompt with an image, one with two, and one of text alone."""
    texts, shown = ["What color is this?", "Which of these two?", "What is the sky?"], [SHOWN[:1], SHOWN[1:3], []]
    return [
        {
            "images": images,
            "prompt": message("user", text),
            "chosen": message("assistant", "It is blue and red."),
            "rejected": message("assistant", "green"),
        }
        for images, text in zip(shown, texts, strict=True)
    ] * 2


def train(library, family, folder, **changes):
    """Returns the trainer after its steps, and its logs."""
    values = {"output_dir": str(folder / library.__name__), "max_steps": STEPS, "logging_steps": 1, "report_to": []}
    values |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True}
    values |= {"bf16": False, "activation_checkpointing": False, "disable_tqdm": True}
    trainer = library.DPOTrainer(
        model=tiny_vision_model(family),
        ref_model=tiny_vision_model(family),
        args=library.DPOConfig(**values | changes),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tiny_processor(family),
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


SLOW = pytest.mark.slow
FAMILIES = ["qwen2_5_vl", *(pytest.param(name, marks=SLOW) for name in ("qwen3_vl", "gemma3", "llava"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_trl(family, tmp_path):
    trainer, logs = train(trl_fast, family, tmp_path)
    _, expected = train(trl, family, tmp_path)
    assert trainer.layout.name == "shared_prefix"
    for ours, theirs in zip(logs, expected, strict=True):
        assert ours.keys() >= theirs.keys() and len(logs) == STEPS
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert logs[-1]["rewards/margins"] > 0.1


def test_entries_are_those_of_trls_collator(tmp_path):
    """A user's hook sees them, and once it has looked they are trained on."""
    trainer, _ = train(trl_fast, "qwen2_5_vl", tmp_path, max_steps=1)
    own = [trainer.train_dataset[index] for index in (0, 1)]
    batch = trainer.data_collator(own)
    theirs = trl.trainer.dpo_trainer.DataCollatorForVisionPreference(tiny_processor("qwen2_5_vl"))(rows()[:2])
    assert batch.keys() == theirs.keys()
    unread = trainer.compute_loss(trainer.model, trainer.data_collator(own))
    for name, expected in theirs.items():
        assert batch[name].tolist() == expected.tolist(), name
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(unread.item(), rel=1e-5)
    batch["pixel_values"] = batch["pixel_values"] * 0
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(unread.item(), rel=1e-4)


@SLOW
def test_precomputed_references_are_those_of_training(tmp_path):
    """TRL refuses them with images."""
    trainer, logs = train(trl_fast, "qwen2_5_vl", tmp_path, precompute_ref_log_probs=True)
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert [entry["loss"] for entry in logs] == pytest.approx(
        [entry["loss"] for entry in train(trl_fast, "qwen2_5_vl", tmp_path)[1]], rel=1e-5
    )
