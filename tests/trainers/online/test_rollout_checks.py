"""Rollouts of users' engines and functions: tensors are taken, what does not fit is named before rewards."""

import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

from trl_fast.rollout import Rollout
from trl_fast.trainers.online.generation_metrics import GenerationMetrics
from trl_fast.trainers.online.rollout_checks import check_rollout, check_sources
from trl_fast.trainers.online.rollout_loop import custom_rollout

PROMPTS = ["p0", "p1"]


def rollout(**changes):
    given = {"prompt_ids": [[1], [2]], "completion_ids": [[3, 4], [5]], "logprobs": [[-1.0, None], [-2]]}
    return Rollout(**{**given, "mask": [[1, 0], [True]], **changes})


def test_tensors_and_arrays_become_lists():
    changed = {
        "prompt_ids": torch.tensor([[1], [2]]),
        "completion_ids": [np.array([3, 4]), (5,)],
        "logprobs": [torch.tensor([-1.0, -2.0]), [np.float32(-2)]],
        "mask": [torch.tensor([True, False]), [torch.tensor(1)]],
    }
    found = check_rollout(rollout(**changed), PROMPTS, 9)
    assert found == rollout(logprobs=[[-1.0, -2.0], [-2.0]], mask=[[True, False], [1]])
    assert all(type(token) is int for ids in found.completion_ids for token in ids)
    plain = rollout()
    lists = plain.completion_ids
    assert check_rollout(plain, PROMPTS, 9).completion_ids[0] is lists[0]


WRONG = {
    "prompt_ids": [
        (None, "the rollout's prompt_ids are None; expected a list with one list for each prompt"),
        ([[1]], "the rollout has 1 prompt_ids for 2 prompts; expected one each"),
        ([[1], []], "the rollout's prompt_ids are empty for the prompt 'p1'"),
    ],
    "completion_ids": [
        ([[3, 4], None], "the rollout's completion_ids for the prompt 'p1' are None; expected a list"),
        ([[3, 4], "ab"], "the rollout's completion_ids for the prompt 'p1' are 'ab'; expected a list"),
        ([[3, 4], [5.0]], "for the prompt 'p1' hold 5.0 of type float; expected integers"),
        ([[3, "4"], [5]], "for the prompt 'p0' hold '4' of type str; expected integers"),
        ([torch.tensor([3.0, 4.0]), [5]], "for the prompt 'p0' hold 3.0 of type float; expected integers"),
        ([[3, 9], [5]], "for the prompt 'p0' have a token outside of the 9 entries"),
        ([[3, -1], [5]], "for the prompt 'p0' have a token outside of the 9 entries"),
    ],
    "logprobs": [
        ([[-1.0, "a"], [-2]], "the rollout's logprobs for the prompt 'p0' hold 'a' of type str; expected numbers, or"),
        ([[[-1.0], [-1.0]], [-2]], r"hold \[-1.0\] of type list; expected numbers, or None"),
        ([[-1.0], [-2]], "logprobs for the prompt 'p0' has 1 values for a completion of 2 tokens"),
        (-1.0, "the rollout's logprobs are -1.0; expected a list with one list for each prompt"),
    ],
    "mask": [
        (
            [[1, 2], [1]],
            r"mask \(a rollout_func's env_mask\) for the prompt 'p0' hold 2 of type int; expected 0 and 1",
        ),
        ([[1, None], [1]], "hold None of type NoneType; expected 0 and 1"),
        ([[1, [1]], [1]], r"hold \[1\] of type list; expected 0 and 1"),
        ([[1, 0.5], [1]], "hold 0.5 of type float; expected 0 and 1"),
    ],
}


@pytest.mark.parametrize(("name", "value", "message"), [(n, v, m) for n, cases in WRONG.items() for v, m in cases])
def test_what_does_not_fit_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        check_rollout(rollout(**{name: value}), PROMPTS, 9)


def test_what_an_engine_must_be():
    with pytest.raises(
        TypeError, match="rollout engine returned {'a': 1} of type dict; expected a trl_fast.rollout.R"
    ):
        check_rollout({"a": 1}, PROMPTS, 9)
    with pytest.raises(TypeError, match="rollout_engine: object has no method generate; expected an object with"):
        check_sources(None, None, None, object())
    with pytest.raises(TypeError, match="rollout_func: expected a function, got 7"):
        check_sources(None, 7, None, None)


async def later(prompts, trainer):
    return {}


OUTPUTS = {
    "None": (lambda prompts, _: None, ValueError, "'<lambda>' returned None; expected a dict with prompt_ids"),
    "async": (later, ValueError, "'later' returned <coroutine .*from a function that is not async"),
    "few values": (
        lambda prompts, _: {**vars(rollout()), "topic": ["a"]},
        ValueError,
        "returned 1 values of 'topic' for 2 prompts; expected a list with one for each",
    ),
    "exit": (lambda prompts, _: sys.exit(3), RuntimeError, "rollout_func '<lambda>' raised SystemExit: 3"),
    "error": (lambda prompts, _: prompts["a"], TypeError, "list indices must be integers"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_rollout_func_returns(name):
    function, error, message = OUTPUTS[name]
    with pytest.raises(error, match=message):
        custom_rollout(function, PROMPTS, None)


def test_a_rollout_func_changes_nothing_but_its_own():
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]

    def greedy(given, _):
        given[0][0]["content"] = "changed"
        return {name: value for name, value in vars(rollout()).items() if name != "mask"}

    custom_rollout(greedy, prompts, None)
    assert prompts[0][0]["content"] == "a"


def test_what_reward_functions_log():
    metrics = object.__new__(GenerationMetrics)
    metrics.columns, metrics.numbers = defaultdict(list), defaultdict(list)
    for value in (1, 2.5, True, np.float32(3), torch.tensor(2.0), torch.tensor([2.0])):
        metrics.log_metric("m", value)
    for value in ("text", None, [1], torch.ones(2)):
        with pytest.raises(TypeError, match=r"log_metric\('m'\): expected a number, got "):
            metrics.log_metric("m", value)
    for log in (metrics.log_metric, metrics.log_column):
        with pytest.raises(TypeError, match="expected a name"):
            log(7, [1])
    # A function may log a column row by row.
    metrics.log_column("whole", ["a"])
    metrics.log_column("whole", ["b"])
    metrics.check_columns(2)
    metrics.log_column("short", ["a"])
    with pytest.raises(ValueError, match="log_extra: reward functions gave column 'short' 1 values for 2 completions"):
        metrics.check_columns(2)
    assert not metrics.columns
