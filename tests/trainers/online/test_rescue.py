"""A reward function that fails: the last whole step is saved, and going on from it ends where an unbroken run does."""

import pytest
import torch

import trl_fast
from support.rollouts import FixedRollout, color_prompts
from support.training import make_trainer

SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 100,
}
METHODS = {
    "GRPO": {"num_generations": 4, "max_completion_length": 4},
    # Two generations a step, of which the second fails.
    "RLOO": {"num_generations": 4, "max_completion_length": 4, "steps_per_generation": 1},
    "PPO": {"response_length": 4, "stop_token": "eos", "num_ppo_epochs": 1},
}


class Fragile:
    """A reward function of which one call fails."""

    __name__ = "fragile"

    def __init__(self, failing=None, error=None):
        self.calls, self.failing, self.error = 0, failing, error or KeyError("solution")

    def __call__(self, completion_ids, **_):
        self.calls += 1
        if self.calls == self.failing:
            raise self.error
        return [float(sum(ids) % 7) for ids in completion_ids]


def make(model_path, folder, method, reward, **settings):
    arguments = {"model": model_path, "train_dataset": color_prompts(8), "eval_dataset": color_prompts(8)}
    arguments["reward_model" if method == "PPO" else "reward_funcs"] = reward
    return make_trainer(
        trl_fast, folder, method=method, arguments=arguments, **{**SETTINGS, **METHODS[method], **settings}
    )


def assert_same_end(trainer, whole):
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, trainer.model.get_parameter(name)), name
    tokens = [[log["num_tokens"] for log in t.state.log_history if "num_tokens" in log][-1] for t in (trainer, whole)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(("method", "failing"), [("GRPO", 3), ("RLOO", 4), ("PPO", 2)])
def test_going_on_after_a_failure_ends_as_an_unbroken_run(method, failing, model_path, tmp_path):
    whole = make(model_path, tmp_path / "whole", method, Fragile())
    whole.train()
    broken = make(model_path, tmp_path / "broken", method, Fragile(failing))
    with pytest.raises(RuntimeError, match="reward function 'fragile' raised KeyError") as failure:
        broken.train()
    step = broken.state.global_step
    assert 0 < step < 3 and f"Step {step} is saved" in failure.value.__notes__[0]
    resumed = make(model_path, tmp_path / "broken", method, Fragile())
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("error", [SystemExit("service refuses"), KeyboardInterrupt()], ids=["exit", "interrupt"])
@pytest.mark.parametrize("where", ["reward_funcs", "rollout_func"])
def test_an_exit_is_an_error_too(where, error, model_path, tokenizer, tmp_path):
    failing, name = Fragile(2, error), type(error).__name__
    broken = make(model_path, tmp_path, "GRPO", failing if where == "reward_funcs" else Fragile())
    if where == "rollout_func":
        sample = FixedRollout(tokenizer)
        broken.rollout_func = lambda prompts, trainer: failing([[1]]) and sample(prompts, trainer)
    kind = {"reward_funcs": "reward function 'fragile'", "rollout_func": "rollout_func '<lambda>'"}[where]
    with pytest.raises(RuntimeError, match=f"{kind} raised {name}") as failure:
        broken.train()
    assert "Step 1 is saved" in failure.value.__notes__[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_in_evaluation_loses_nothing_either(method, model_path, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    calls = {"GRPO": 3, "RLOO": 5, "PPO": 3}
    broken = make(model_path, tmp_path, method, Fragile(calls[method]), **settings)
    with pytest.raises(RuntimeError, match="reward function 'fragile'") as failure:
        broken.train()
    assert "Step 2 is saved" in failure.value.__notes__[0] and not broken.model.training
    resumed = make(model_path, tmp_path, method, Fragile())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_nothing_is_saved_where_nothing_is_new(model_path, tmp_path):
    for settings in ({"max_steps": 1}, {"save_strategy": "no"}):
        broken = make(model_path, tmp_path, "GRPO", Fragile(1 if "max_steps" in settings else 2), **settings)
        with pytest.raises(RuntimeError, match="fragile") as failure:
            broken.train()
        assert not hasattr(failure.value, "__notes__") and not list(tmp_path.glob("checkpoint-*"))
