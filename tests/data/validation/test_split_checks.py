"""Checks across rows and splits, and the intervals."""

import itertools
import random

import numpy as np
import pytest
from datasets import Dataset

from trl_fast.data import validate
from trl_fast.data.validation.split_checks import hanley_mcneil_interval, probability_longer, wilson_interval


def pairs(*rows):
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def labelled(*rows):
    return Dataset.from_list([dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows])


def found(dataset):
    """(split, code) of the findings, to the rows and the detail."""
    report = validate(dataset)
    return {(item.split, item.kind.code): (list(item.row_numbers), item.detail) for item in report.findings}


def test_repetitions_within_a_split():
    findings = found(pairs(("p", "a", "b"), ("p", "a", "c"), ("q", "a", "b"), (" p ", "a", "b\n"), ("q", "x", "y")))
    assert findings["train", "repeated_row"] == ([3], "equals row 0")
    assert findings["train", "repeated_prompt"] == ([1, 4], "prompt of row 0")
    assert ("train", "repeated_prompt") not in found(pairs(("", "a", "b"), ("", "c", "d")))


def test_leaks_between_splits():
    train = pairs(("p", "a", "b"), ("q", "a", "b"), ("r", "a", "b"))
    test = pairs(("s", "a", "b"), ("q", "x", "y"), ("r", "a", "b"), ("r", "b", "a"))
    findings = found({"train": train, "test": test})
    assert findings["test", "leaked_row"] == ([2], "row 2 of train")
    assert findings["test", "leaked_prompt"] == ([1, 3], "row 1 of train")
    assert not any(code.startswith("leaked") for split, code in findings if split == "train")


def test_conversations_are_compared_by_roles_texts_and_tool_calls():
    def row(content, role="user", calls=None):
        prompt = [{"role": role, "content": content, "tool_calls": calls}]
        return prompt, [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]

    findings = found(pairs(row("p"), row("p "), row("p", "tool"), row("p", calls=["f"])))
    assert findings["train", "repeated_row"][0] == [1]


def test_implicit_prompts_count_up_to_their_last_line_break():
    """Both responses to the first question begin with "I", which a split at the first difference gives the prompt."""
    texts = [("Q: hi\nA: I do", "Q: hi\nA: I am"), ("Q: hi\nA: no", "Q: hi\nA: yes"), ("Word one", "Word two")] * 2
    dataset = Dataset.from_list([{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts])
    findings = found({"train": dataset.select(range(1)), "test": dataset.select(range(1, 3))})
    assert findings["test", "leaked_prompt"] == ([0], "row 0 of train")
    assert found(dataset)["train", "repeated_row"] == ([3, 4, 5], "equals row 0")


def test_conflicts_of_pairs():
    findings = found(
        pairs(("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("q", "b", "c"), ("r", "b", "a"), ("s", "a", "a"))
    )
    assert findings["train", "label_conflict"] == ([0, 1], "reverse of row 1")
    assert findings["train", "chosen_and_rejected"][0] == [2, 3]


def test_conflicts_and_balance_of_labels():
    findings = found(
        labelled(("p", "a", True), ("p", "b", True), ("p", "a", False), ("q", "a", False), ("p", "b", True))
    )
    assert findings["train", "label_conflict"][0] == [0, 2]
    assert findings["train", "repeated_row"][0] == [4]
    assert findings["train", "label_balance"][0] == [0, 1, 4]
    assert findings["train", "repeated_prompt"][0] == [1, 2]
    assert found(labelled(("p", "a", True), ("q", "b", True)))["train", "one_label"][0] == [0, 1]


def test_length_bias_of_pairs():
    biased = [(f"p{row}", "long answer", "short") for row in range(30)]
    even = [(f"p{row}", *(("ab", "a") if row % 2 else ("a", "ab"))) for row in range(30)]
    tied = [("q", "ab", "cd"), ("r", "ab", "cd")]
    rows, detail = found(pairs(*biased, *tied))["train", "length_bias"]
    assert rows == list(range(30)) and "100.0% of 30 pairs" in detail and "88.6% to 100.0%, in characters" in detail
    findings = found(pairs(*even, *tied))
    assert ("train", "length_bias") not in findings
    assert findings["train", "length_share"][0] == list(range(1, 30, 2))
    assert not {("train", "length_share"), ("train", "length_bias")} & found(pairs(*tied)).keys()


def test_length_bias_of_labels():
    rows = [(f"p{row}", "long" * 5 if row % 2 else f"s{row}", bool(row % 2)) for row in range(40)]
    assert "100.0%" in found(labelled(*rows))["train", "length_bias"][1]
    rows = [(f"p{row}", "same", bool(row % 2)) for row in range(40)]
    assert "50.0%" in found(labelled(*rows))["train", "length_share"][1]


def test_wilson_interval():
    """By hand, from the quadratic whose roots are the bounds: (k/n − p)² = z² p (1 − p) / n."""
    for successes, trials in ((0, 10), (3, 10), (81, 263), (10, 10)):
        for bound in wilson_interval(successes, trials):
            assert (successes / trials - bound) ** 2 == pytest.approx(
                1.959964**2 * bound * (1 - bound) / trials, abs=1e-12
            )
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_probability_longer_and_its_interval():
    rng = random.Random(0)
    first, second = ([rng.randint(0, 20) for _ in range(size)] for size in (17, 23))
    wins = [(a > b) + (a == b) / 2 for a, b in itertools.product(first, second)]
    area = probability_longer(np.array(first), np.array(second))
    assert area == pytest.approx(sum(wins) / len(wins))
    # Hanley and McNeil 1982: area 0.893 of 58 normal and 51 abnormal cases has the standard error 0.032.
    low, high = hanley_mcneil_interval(0.893, 51, 58)
    assert (high - low) / 2 / 1.959964 == pytest.approx(0.032, abs=1e-3)
