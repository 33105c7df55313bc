"""KTO on completions whose prompts have images, against TRL: loss, gradient norm and metrics of several steps."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset

import trl_fast
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor

STEPS = 3
SHOWN = pictures(7)
# Each says once whose completion another row's prompt gets.
TEXTS = ["It is blue and red.", "green", "Of course it is the sea.", "No."]


def message(role, content):
    return [{"role": role, "content": content}]


def rows():
    """Prompts with an image, with two, and of text alone."""
    texts = ["What color is this?", "Which of these two?", "What is the sky?", "And this?"]
    shown = [SHOWN[:1], SHOWN[1:3], [], SHOWN[3:4]]
    return [
        {
            "images": images,
            "prompt": message("user", text),
            "completion": message("assistant", answer),
            "label": number % 2 == 0,
        }
        for number, (images, text, answer) in enumerate(zip(shown, texts, TEXTS, strict=True))
    ] * 2


def train(library, family, folder, data=None, **changes):
    """Returns the trainer after its steps, and its logs."""
    values = {"output_dir": str(folder / library.__name__), "max_steps": STEPS, "logging_steps": 1, "report_to": []}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True}
    values |= {"bf16": False, "activation_checkpointing": False, "disable_tqdm": True}
    trainer = library.KTOTrainer(
        model=tiny_vision_model(family),
        ref_model=tiny_vision_model(family, seed=1),
        args=library.KTOConfig(**values | changes),
        train_dataset=Dataset.from_list(rows() if data is None else data),
        processing_class=tiny_processor(family),
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


SLOW = pytest.mark.slow
FAMILIES = ["qwen2_5_vl", *(pytest.param(name, marks=SLOW) for name in ("qwen3_vl", "gemma3", "llava"))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_type", ["kto", pytest.param("apo_zero_unpaired", marks=SLOW)])
def test_steps_are_those_of_trl(family, loss_type, tmp_path):
    trainer, logs = train(trl_fast, family, tmp_path, loss_type=loss_type)
    _, expected = train(trl, family, tmp_path, loss_type=loss_type)
    assert trainer.layout.name == "shared_prefix"
    for ours, theirs in zip(logs, expected, strict=True):
        assert ours.keys() >= theirs.keys() and len(logs) == STEPS
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # The estimate of other tiny models happens to be 0 or less.
    assert family != "qwen2_5_vl" or any(log["kl"] > 0 for log in logs) == (loss_type == "kto")


def test_entries_are_those_of_trls_collator(tmp_path):
    """A mismatched completion stands behind the prompt with its image; a user's hook sees all, and what it changes."""
    trainer, _ = train(trl_fast, "qwen2_5_vl", tmp_path, max_steps=1)
    own = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(own)
    theirs = trl.trainer.kto_trainer.DataCollatorForVisionUnpairedPreference(tiny_processor("qwen2_5_vl"))(rows()[:4])
    assert batch.keys() == theirs.keys()
    with torch.no_grad():
        unread = trainer.compute_loss(trainer.model, trainer.data_collator(own))
        for name, expected in theirs.items():
            assert batch[name].tolist() == expected.tolist(), name
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(unread.item(), rel=1e-5)
        batch["pixel_values"] = batch["pixel_values"] * 0
        assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(unread.item(), rel=1e-4)


def test_layouts_and_columns_of_images_do_not_matter(tmp_path):
    """One image a row: in a column of lists, or in one of images; rows padded, packed, and with shared prompts.

    The reference's numbers may be computed before, which TRL refuses with images.
    """
    shown = [{**row, "images": SHOWN[number : number + 1]} for number, row in enumerate(rows()[:4])]
    single = [{**row, "image": row["images"][0]} for row in shown]
    for row in single:
        del row["images"]
    runs = [("shared_prefix", shown, False), ("packed", single, False), ("padded", single, False)]
    logs = [
        train(
            trl_fast, "qwen2_5_vl", tmp_path, data, batch_layout=layout, precompute_ref_log_probs=before, max_steps=1
        )[1]
        for layout, data, before in [*runs, ("shared_prefix", shown, True)]
    ]
    names = ("grad_norm", "loss", "kl", "rewards/margins")
    first, *others = [[[log[name] for name in names] for log in of_run] for of_run in logs]
    assert others == [[pytest.approx(log, rel=2e-5) for log in first]] * 3


def test_what_cannot_be_trained_on_is_named(tmp_path):
    pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"]} for row in rows()]
    for row in pairs:
        del row["completion"], row["label"]
    with pytest.raises(ValueError, match="has images and pairs"):
        train(trl_fast, "qwen2_5_vl", tmp_path, pairs)
    with pytest.raises(ValueError, match="row 0.*max_length=6 would cut"):
        train(trl_fast, "qwen2_5_vl", tmp_path, max_length=6)
