"""A run that really learns: good and bad endings, on prompts that were not trained on."""

import random

import pytest
from datasets import Dataset

import trl_fast
from support.training import make_trainer

COLORS = ("blue", "green", "red", "grey", "pink", "teal")


def endings(count, seed):
    """A good answer repeats the question's last word; a bad one says another color."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        said, other = rng.sample(COLORS, 2)
        good = rng.random() < 0.5
        rows.append(
            {"prompt": f"{rng.randrange(1000)} is {said}", "completion": f" {said if good else other}", "label": good}
        )
    return Dataset.from_list(rows)


@pytest.mark.slow
def test_held_out_rewards_part(model_path, tmp_path):
    arguments = {"model": model_path, "train_dataset": endings(320, 0), "eval_dataset": endings(60, 1)}
    trainer = make_trainer(
        trl_fast,
        tmp_path,
        method="KTO",
        arguments=arguments,
        max_steps=80,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=5e-3,
        warmup_steps=5,
        logging_steps=20,
        gradient_checkpointing=False,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.5, abs=1e-4)
    assert after["eval_loss"] < 0.4
    assert after["eval_rewards/margins"] > 1.0
