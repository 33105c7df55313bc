"""Checks the arguments that the ops refuse, each by name."""

from __future__ import annotations

import pytest
import torch

from support.heads import make_problem
from support.losses import pair_problem, policy_problem
from trl_fast.ops import (
    linear_cross_entropy,
    linear_logprob,
    linear_token_loss,
    pair_loss,
    policy_loss,
    selective_log_softmax,
)

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
        (dict(temperature=1e-39), "temperature=1e-39: expected a number with which float32 can compute"),
        (dict(temperature=1e39), "temperature=1e.39: expected a number with which float32"),
        (dict(temperature=float("nan")), "temperature must be a positive finite number"),
        (dict(softcap=1e-320), "softcap=1e-320: expected a number with which float32"),
        (dict(softcap=float("inf")), "softcap must be a positive finite number"),
        (dict(logit_scale=1e39), "logit_scale=1e.39: expected a number with which float32"),
        (dict(logit_scale=1e-320), "logit_scale=1e-320: expected a number with which float32"),
        (dict(workspace_bytes=100), "workspace_bytes: 100 bytes hold no row"),
        (dict(workspace_bytes=-5), "workspace_bytes: -5 bytes hold no row"),
        (dict(head_grad="sparse", sparse_threshold=float("nan")), "sparse_threshold must lie between 0 and 1"),
        (dict(hidden=torch.randn(4, 8), weight=torch.ones(30, 8, dtype=torch.int32)), "weight: expected a floating"),
        (dict(bias=torch.ones(30, dtype=torch.long)), "bias: expected a floating-point dtype"),
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
    for z_loss in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="z_loss must not be negative and be finite"):
            call(linear_cross_entropy, z_loss=z_loss)
    for num_items in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"num_items: expected a number of tokens of at least 1, got {num_items}"):
            call(linear_cross_entropy, num_items=num_items)
    for count in (torch.tensor([4, 5]), torch.ones(0), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="num_items: expected one number of tokens, got shape"):
            call(linear_cross_entropy, num_items=count)


def test_a_number_of_items_may_have_any_shape_of_one_number():
    expected = call(linear_cross_entropy, num_items=7)
    for count in (torch.tensor(7), torch.tensor([7]), torch.tensor([[7.0]])):
        found = call(linear_cross_entropy, num_items=count)
        assert found.shape == () and torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [[3], [5], [-1, 5], [2, 3], []])
def test_groups_that_are_not_those_of_the_rows_are_refused(sizes):
    with pytest.raises(ValueError, match="group_sizes: expected numbers of rows that sum to the 4 of hidden"):
        call(linear_token_loss, group_sizes=sizes, token_loss=lambda scores, _: scores.logprobs.sum())


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(beta=float("nan")), "beta=nan"),
        (dict(beta=float("inf")), "beta=inf"),
        (dict(epsilon_low=float("nan")), "epsilon_low=nan"),
        (dict(delta=float("nan")), "delta=nan"),
        (dict(temperature_pos=0.0), "temperature_pos=0.0"),
    ],
)
def test_numbers_of_a_policy_loss(numbers, message):
    positional, reference = policy_problem((3, 4)).arguments()
    with pytest.raises(ValueError, match=message):
        policy_loss(*positional, **reference, **numbers)


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(beta=float("nan")), "beta=nan: expected"),
        (dict(beta=float("inf")), "beta=inf: expected"),
        (dict(label_smoothing=float("nan")), "label_smoothing=nan"),
        (dict(discopop_tau=float("nan"), loss_type="discopop"), "discopop_tau=nan"),
    ],
)
def test_numbers_of_a_pair_loss(numbers, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(*pair_problem((3, 4)).arguments(), **numbers)


def test_no_rows_may_have_strides():
    big, nothing = torch.randn(6, 15), torch.zeros(0, dtype=torch.long)
    assert selective_log_softmax(big[:0, ::2], nothing).shape == (0,)
    for head_grad in ("exact", "sparse"):
        weight = torch.randn(30, 8, requires_grad=True)
        hidden = big[:0, ::2].detach().requires_grad_()
        linear_logprob(hidden, weight, nothing, head_grad=head_grad).logprobs.sum().backward()
        assert hidden.grad.shape == (0, 8) and not weight.grad.any()


@pytest.mark.parametrize("op", HEADS)
def test_hidden_states_without_numbers_give_uniform_words(op):
    hidden, weight = torch.zeros(4, 0, requires_grad=True), torch.zeros(30, 0, requires_grad=True)
    bias = torch.zeros(30, requires_grad=True)
    found = call(op, hidden=hidden, weight=weight, bias=bias)
    values = found if isinstance(found, torch.Tensor) else found.logprobs
    torch.testing.assert_close(values.abs(), torch.full_like(values, 30.0).log())
    values.sum().backward()
    assert hidden.grad.shape == (4, 0) and weight.grad.shape == (30, 0) and bias.grad.abs().sum() > 0


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
