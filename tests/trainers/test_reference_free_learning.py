"""Runs that learn, without a reference: on prompts that were not trained on, the better ending gets likelier."""

import random

import pytest
from datasets import Dataset

import trl_fast
from support.training import make_trainer

COLORS = ("blue", "green", "red", "grey", "pink", "teal")
# The settings of each method, and how far apart the held-out log-probs of chosen and rejected come at least.
RUNS = {
    "ORPO": {"beta": 0.5},
    "CPO": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    "TPO": {"beta": 0.5},
}


def endings(count, seed):
    """The chosen answer repeats the question's last word; the rejected one says another color."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        said, other = rng.sample(COLORS, 2)
        prompt = f"{rng.randrange(1000)} is {said}"
        rows.append({"prompt": prompt, "chosen": f" {said}", "rejected": f" {other}", "reference": f" {said}"})
    return Dataset.from_list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_held_out_answers_part(method, model_path, tmp_path):
    rows = {"train_dataset": endings(320, 0), "eval_dataset": endings(60, 1)}
    trainer = make_trainer(
        trl_fast,
        tmp_path,
        method=method,
        arguments={"model": model_path, **rows},
        **RUNS[method],
        max_steps=80,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=5e-3,
        warmup_steps=5,
        logging_steps=20,
        gradient_checkpointing=False,
    )
    trainer.evaluate()
    before = trainer.state.log_history[-1]
    trainer.train()
    trainer.evaluate()
    after = trainer.state.log_history[-1]
    assert after["eval_loss"] < before["eval_loss"]
    assert before["eval_rewards/accuracies"] < 0.7 < 0.9 < after["eval_rewards/accuracies"]
