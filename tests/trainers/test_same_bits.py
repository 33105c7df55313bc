"""A policy that has not changed yet has exactly its own log-probs: ratios are 1, rewards and KL are 0."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

import trl_fast
from support.rollouts import FixedRollout, color_prompts
from support.training import color_pairs, make_trainer
from trl_fast.trainers.online import group_trainer
from trl_fast.trainers.online.micro_batches import UpdateMaker

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

LAYOUTS = ("shared_prefix", "packed", "padded")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_step_of_dpo_has_no_rewards(layout, dtype, model_path, tmp_path):
    arguments = {"model": model_path, "train_dataset": color_pairs()}
    settings = {"batch_layout": layout, "model_init_kwargs": {"dtype": dtype}, "bf16": dtype == "bfloat16"}
    trainer = make_trainer(trl_fast, tmp_path, arguments=arguments, max_steps=1, **settings)
    trainer.train()
    first = trainer.state.log_history[0]
    rewards = {
        name: value for name, value in first.items() if name.startswith("rewards/") and "accuracies" not in name
    }
    assert len(rewards) == 3 and set(rewards.values()) == {0.0}
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-7)


def ties(completion_ids, shade, **_):
    """The same reward for all completions of every other prompt."""
    return [float(len(ids)) if value % 2 else 1.0 for ids, value in zip(completion_ids, shade, strict=True)]


def make_group_trainer(method, layout, model_path, tokenizer, tmp_path, **settings):
    """GRPO's or RLOO's trainer of prompts and completions of many lengths."""
    arguments = {
        "model": model_path,
        "reward_funcs": ties,
        "train_dataset": color_prompts(),
        "rollout_func": FixedRollout(tokenizer, longest=30),
    }
    sizes = {"num_generations": 4, "max_completion_length": 31}
    return make_trainer(
        trl_fast, tmp_path, method=method, arguments=arguments, batch_layout=layout, **{**sizes, **settings}
    )


@pytest.fixture
def updates(monkeypatch):
    """The old, reference and present log-probs (N,) of each micro-batch of the update."""
    found = []

    def policy_step(model, update, config, **options):
        result, metrics = group_trainer_step(model, update, config, **options)
        inputs = update.loss_inputs
        found.append((inputs.old_logprobs, inputs.ref_logprobs, result.scores.logprobs))
        return result, metrics

    group_trainer_step = group_trainer.policy_step
    monkeypatch.setattr(group_trainer, "policy_step", policy_step)
    return found


@pytest.fixture
def batches(monkeypatch):
    """How often each batch of completions was laid out, by its prompts and completions in order."""
    found = Counter()
    token_batch = UpdateMaker.token_batch

    def counted(maker, samples):
        found[repr((samples.prompt_ids, samples.completion_ids))] += 1
        return token_batch(maker, samples)

    monkeypatch.setattr(UpdateMaker, "token_batch", counted)
    return found


# Every pair of method, layout, beta and dtype.
UNCHANGED = [
    ("GRPO", "shared_prefix", 0.0, "float32"),
    ("RLOO", "shared_prefix", 0.1, "bfloat16"),
    ("RLOO", "packed", 0.0, "bfloat16"),
    ("GRPO", "packed", 0.1, "float32"),
    ("RLOO", "padded", 0.0, "float32"),
    ("GRPO", "padded", 0.1, "bfloat16"),
]


@pytest.mark.parametrize("method, layout, beta, dtype", UNCHANGED)
def test_the_ratio_of_a_policy_that_has_not_changed_is_one(
    method, layout, beta, dtype, updates, batches, model_path, tokenizer, tmp_path
):
    """Two optimizer steps on 16 completions, of which the first one has the policy that sampled."""
    settings = {"beta": beta, "max_steps": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    settings |= {"model_init_kwargs": {"dtype": dtype}, "bf16": dtype == "bfloat16"}
    trainer = make_group_trainer(method, layout, model_path, tokenizer, tmp_path, **settings)
    trainer.train()
    # Whatever the size of the products: every pass has had the same batches.
    assert len(updates) == len(batches) == 4 and set(batches.values()) == {3 if beta else 2}
    for old, reference, new in updates[:2]:
        assert torch.equal(old, new), f"{(old - new).abs().max()} nats"
        assert reference is None or torch.equal(reference, new)
    assert not any(torch.equal(old, new) for old, _, new in updates[2:])
    if beta:
        assert trainer.state.log_history[0]["kl"] == 0.0


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_update_of_grpo_has_no_kl(layout, together, updates, model_path, tokenizer, tmp_path):
    settings = {"beta": 0.1, "max_steps": 1, "keep_groups_together": together, "mask_truncated_completions": True}
    trainer = make_group_trainer("GRPO", layout, model_path, tokenizer, tmp_path, **settings)
    trainer.train()
    assert all(old is None and torch.equal(reference, new) for old, reference, new in updates)
    assert trainer.state.log_history[0]["kl"] == 0.0
