"""A run that really learns: preferences between two endings, on prompts that were not trained on."""

import random

import pytest
from datasets import Dataset
from peft import LoraConfig

import trl_fast
from support.training import make_trainer

COLORS = ("blue", "green", "red", "grey", "pink", "teal")


def endings(count, seed):
    """The better answer repeats the question's last word; the worse one says another color."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        right, wrong = rng.sample(COLORS, 2)
        rows.append({"prompt": f"{rng.randrange(1000)} is {right}", "chosen": f" {right}", "rejected": f" {wrong}"})
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("peft", "head_grad"),
    [
        (False, "exact"),
        *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((True, "exact"), (False, "sparse"))),
    ],
    ids=["whole model", "LoRA", "sparse gradient of the head"],
)
def test_held_out_accuracy_rises(peft, head_grad, model_path, tmp_path):
    arguments = {"model": model_path, "train_dataset": endings(240, 0), "eval_dataset": endings(60, 1)}
    if peft:
        arguments["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(
        trl_fast,
        tmp_path,
        arguments=arguments,
        max_steps=120,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=2e-2 if peft else 5e-3,
        warmup_steps=5,
        logging_steps=20,
        gradient_checkpointing=False,
        head_grad=head_grad,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert after["eval_loss"] < 0.5
    assert after["eval_rewards/accuracies"] > 0.85
    assert after["eval_rewards/margins"] > 1.0
