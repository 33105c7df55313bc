"""Checks the arguments that the ops refuse, each by name."""

from __future__ import annotations

import pytest
import torch

from support.heads import make_problem
from trl_fast.ops import linear_cross_entropy, linear_logprob, selective_log_softmax

HEADS = [linear_logprob, linear_cross_entropy]


def call(op, **changes):
    problem = make_problem(4, 30, h=8)
    arguments = {"hidden": problem.hidden, "weight": problem.weight, "targets": problem.targets} | changes
    return op(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("op", HEADS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden=torch.randn(2, 2, 8)), r"hidden: expected shape \(N, H\)"),
        (dict(weight=torch.randn(30, 9)), r"weight: expected shape \(V, 8\), got shape \(30, 9\)"),
        (dict(weight=torch.randn(0, 8)), "weight: expected at least one row"),
        (dict(weight=torch.randn(30, 8).bfloat16()), "weight: expected torch.float32 as hidden has.*bfloat16"),
        (dict(hidden=torch.ones(4, 8, dtype=torch.long)), "hidden: expected a floating-point dtype"),
        (dict(targets=torch.zeros(5, dtype=torch.long)), r"targets: expected shape \(4,\)"),
        (dict(targets=torch.zeros(4)), "targets: expected an integer dtype"),
        (dict(targets=torch.zeros(4, dtype=torch.long, device="meta")), "targets: expected device cpu"),
        (dict(weight=torch.randn(30, 8, device="meta")), "weight: expected device cpu"),
        (dict(bias=torch.randn(29)), r"bias: expected \(30,\)"),
        (dict(targets=torch.tensor([0, 1, 30, 2])), r"targets: row 2 is 30, outside the head's vocabulary \[0, 30\)"),
        (dict(targets=torch.tensor([0, -1, 3, 2])), "targets: row 1 is -1"),
        (dict(temperature=0.0), "temperature must be a positive"),
        (dict(softcap=0.0), "softcap must be a positive"),
        (dict(logit_scale=float("nan")), "logit_scale must be a finite"),
        (dict(workspace_bytes=100), "workspace_bytes: 100 bytes hold no row"),
    ],
)
def test_heads_refuse(op, changes, message):
    with pytest.raises(ValueError, match=message):
        call(op, **changes)


def test_unknown_outputs_and_options():
    with pytest.raises(ValueError, match="outputs: unknown name 'perplexity'"):
        call(linear_logprob, outputs=("perplexity",))
    with pytest.raises(ValueError, match="reduction: unknown value 'max'"):
        call(linear_cross_entropy, reduction="max")
    with pytest.raises(ValueError, match="label_smoothing must lie"):
        call(linear_cross_entropy, label_smoothing=1.5)
    with pytest.raises(ValueError, match="z_loss must not be negative"):
        call(linear_cross_entropy, z_loss=-1.0)
    for num_items in (0, -3):
        with pytest.raises(ValueError, match=f"num_items: expected a number of tokens of at least 1, got {num_items}"):
            call(linear_cross_entropy, num_items=num_items)


def test_selective_refuses():
    with pytest.raises(ValueError, match=r"index: expected shape \(3,\)"):
        selective_log_softmax(torch.randn(3, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="index: row 1 is 9"):
        selective_log_softmax(torch.randn(2, 5), torch.tensor([1, 9]))


def test_logits_that_are_not_finite_are_named_on_request(monkeypatch):
    logits, index = torch.randn(2, 2, 5), torch.zeros(2, 2, dtype=torch.long)
    logits[0, 1, 2] = float("-inf")
    monkeypatch.setenv("TRL_FAST_CHECK", "1")
    assert selective_log_softmax(logits, index).isfinite().all()
    for value in ("nan", "inf"):
        logits[1, 0, 2] = float(value)
        with pytest.raises(ValueError, match="logits: 1 of 4 rows are not finite.*first row 2"):
            selective_log_softmax(logits, index)


@pytest.mark.parametrize("op", HEADS)
def test_nan_in_hidden_is_named_on_request(op, monkeypatch):
    hidden = torch.randn(4, 8)
    hidden[2, 3] = float("nan")
    call(op, hidden=hidden)
    monkeypatch.setenv("TRL_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="hidden: 1 of 4 rows are not finite.*first row 2"):
        call(op, hidden=hidden)
