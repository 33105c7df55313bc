"""PPO that really learns: completions of prompts that were not trained on, scored before and after."""

import random

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
from support.training import make_trainer

SETTINGS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "per_device_eval_batch_size": 64,
    "response_length": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "temperature": 1.0,
    "kl_coef": 0.01,
    "logging_steps": 5,
    "num_sample_generations": 0,
    "gradient_checkpointing": False,
}


def is_good(token):
    return token % 3 == 0


def good_share(completion_ids, **_):
    return [sum(map(is_good, ids)) / len(ids) for ids in completion_ids]


def prompts(count, seed):
    rng = random.Random(seed)
    return Dataset.from_list([{"prompt": f"What color is {rng.randrange(10**6)}?"} for _ in range(count)])


def run_ppo(tokenizer, model_path, tmp_path, **changes):
    """Scores of held-out prompts, before and after; a function of completions may be given to look at them."""
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(model_path),
        "processing_class": tokenizer,
        "reward_model": changes.pop("reward_model"),
        "value_model": changes.pop("value_model", None),
        "train_dataset": prompts(256, 0),
        "eval_dataset": prompts(64, 1),
    }
    trainer = make_trainer(trl_fast, tmp_path, method="PPO", arguments=arguments, **{**SETTINGS, **changes})
    rows = list(trainer.eval_dataset)
    before, held = trainer.evaluate(), trainer.roll_out(rows)
    trainer.train()
    after, found = trainer.evaluate(), trainer.roll_out(rows)
    shares = [sum(good_share(part.samples.completion_ids)) / len(rows) for part in (held, found)]
    return before, after, shares, trainer


@pytest.mark.slow
def test_a_reward_function(tokenizer, model_path, tmp_path):
    before, after, (first, last), trainer = run_ppo(
        tokenizer, model_path, tmp_path, reward_model=good_share, max_steps=24
    )
    assert first < 0.4 and last > 0.65
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 0.3
    losses = [log["loss/value_avg"] for log in trainer.state.log_history if "loss/value_avg" in log]
    assert losses[-1] < losses[0]
    assert after["eval_objective/kl"] > before["eval_objective/kl"] + 1


def preferences(tokenizer, count, seed):
    """Pairs of completions as tokens; the chosen one has more of the good tokens."""
    rng = random.Random(seed)
    good = [token for token in range(3, len(tokenizer)) if is_good(token)]
    bad = [token for token in range(3, len(tokenizer)) if not is_good(token)]
    rows = []
    for row in prompts(count, seed + 100):
        prompt = tokenizer(text=row["prompt"])["input_ids"]
        few, many = sorted(rng.sample(range(9), 2))
        pair = []
        for number in (many, few):
            ids = rng.choices(good, k=number) + rng.choices(bad, k=8 - number)
            rng.shuffle(ids)
            pair.append(prompt + ids)
        rows.append({"chosen_ids": pair[0], "rejected_ids": pair[1]})
    return Dataset.from_list(rows)


@pytest.mark.slow
def test_a_learned_reward_model(tokenizer, model_path, reward_model_path, tmp_path):
    reward = make_trainer(
        trl_fast,
        tmp_path / "reward",
        method="Reward",
        arguments={
            "model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
            "processing_class": tokenizer,
            "train_dataset": preferences(tokenizer, 4096, 0),
            "eval_dataset": preferences(tokenizer, 256, 1),
        },
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=64,
        max_steps=400,
        learning_rate=3e-3,
        logging_steps=100,
        gradient_checkpointing=False,
    )
    reward.train()
    assert reward.evaluate()["eval_accuracy"] > 0.8
    settings = {"max_steps": 100, "learning_rate": 5e-3, "lr_scheduler_type": "linear"}
    before, after, (first, last), _ = run_ppo(
        tokenizer, model_path, tmp_path / "ppo", reward_model=reward.model, **settings
    )
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 1
    assert first < 0.4 and last > 0.7
