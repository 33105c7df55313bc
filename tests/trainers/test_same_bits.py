"""A policy that has not changed yet has exactly its own log-probs: rewards and KL are 0."""

from __future__ import annotations

import math

import pytest

import trl_fast
from support.rollouts import FixedRollout, brevity, color_prompts
from support.training import color_pairs, make_trainer

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


@pytest.mark.parametrize(
    "method, layout",
    [("GRPO", "shared_prefix"), ("GRPO", "packed"), *(("RLOO", layout) for layout in LAYOUTS)],
)
def test_the_first_update_of_a_group_method_has_no_kl(method, layout, model_path, tokenizer, tmp_path):
    arguments = {
        "model": model_path,
        "reward_funcs": brevity,
        "train_dataset": color_prompts(),
        "rollout_func": FixedRollout(tokenizer),
    }
    settings = {"num_generations": 4, "max_completion_length": 8, "max_steps": 1, "beta": 0.1, "num_iterations": 2}
    trainer = make_trainer(trl_fast, tmp_path, method=method, arguments=arguments, batch_layout=layout, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0
