"""Generations that nothing can be learned from are told of once, with what to look at."""

import pytest

import trl_fast
from support.rollouts import FixedEngine, color_prompts
from support.training import make_trainer
from trl_fast.rollout import Rollout

PROMPT = "first prompt: 'What color is"


class Endless(FixedEngine):
    """Completions of three tokens, none of which is an end token; or, of `ended`, the first one has one."""

    def __init__(self, tokenizer, ended=False):
        super().__init__(tokenizer)
        self.end = [tokenizer.eos_token_id] if ended else []

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [[3 + i, 4, 5] + (self.end if i == 0 else []) for i in range(len(prompt_ids))])


def same(completions, **_):
    return [0.5] * len(completions)


def differing(completion_ids, **_):
    return [float(sum(ids)) for ids in completion_ids]


def warnings_of(caplog, model_path, folder, method, engine, reward, **settings):
    arguments = {"model": model_path, "train_dataset": color_prompts(8), "rollout_engine": engine}
    arguments["reward_model" if method == "PPO" else "reward_funcs"] = reward
    online = {"response_length": 4, "stop_token": "eos", "num_ppo_epochs": 1}
    if method != "PPO":
        online = {"num_generations": 4, "max_completion_length": 4}
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, **online, **settings}
    caplog.clear()
    make_trainer(trl_fast, folder, method=method, arguments=arguments, max_steps=2, **settings).train()
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "trl_fast.trainers.online.generation_warnings"
    ]


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_equal_rewards(method, model_path, tokenizer, tmp_path, caplog):
    how = (caplog, model_path, tmp_path, method)
    (message,) = warnings_of(*how, FixedEngine(tokenizer), same)
    assert "same reward, here 0.5" in message and "reward functions 'same'" in message and PROMPT in message
    assert not warnings_of(*how, FixedEngine(tokenizer), differing)


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_completions_that_never_end(method, model_path, tokenizer, tmp_path, caplog):
    how = (caplog, model_path, tmp_path, method)
    (message,) = warnings_of(*how, Endless(tokenizer), differing)
    setting = "response_length=4" if method == "PPO" else "max_completion_length=4"
    end = f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})"
    assert f"None of the 8 completions of a generation came to an end: all were cut off at {setting}" in message
    assert end in message and "mask_truncated" not in message
    assert not warnings_of(*how, Endless(tokenizer, ended=True), differing)
    if method == "PPO":
        assert not warnings_of(*how, Endless(tokenizer), differing, stop_token=None)
    else:
        (message,) = warnings_of(*how, Endless(tokenizer), differing, mask_truncated_completions=True)
        assert "mask_truncated_completions=True lets nothing be learned" in message


def test_no_reward_at_all_is_not_told_twice(model_path, tokenizer, tmp_path, caplog):
    def silent(completions, **_):
        return [None] * len(completions)

    assert not warnings_of(caplog, model_path, tmp_path, "GRPO", FixedEngine(tokenizer), silent)
