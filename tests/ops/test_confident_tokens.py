"""Holds log-probabilities and gradients to float64 where the model is sure of a token, as far as float32 has numbers.

Logits are exact: a hidden state is a unit vector, so that they are a column of the weight, and multiples of 2⁻⁴, so
that bfloat16 has them too. In float64 the other classes are kept apart as well: a plain log-softmax in float64 ends
at a margin of 36 nats.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trl_fast.ops import (
    linear_cross_entropy,
    linear_logprob,
    linear_token_loss,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

V = 300
MARGINS = (-30.0, -1.0, 0.0, 1.0, 5.0, 10.0, 17.0, 18.5, 20.0, 30.0, 40.0, 80.0, 100.0, 1000.0)
# What is left where single probabilities are below the normal numbers of float32: those may be 0.
TINY = 1e-34


def confident_rows(offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, V) float32 in which the target is above the largest other by a margin each; targets (R,).

    Some rows have several largest logits, some −inf.
    """
    generator = torch.Generator().manual_seed(0)
    rows = len(MARGINS)
    logits = (torch.randint(-160, 0, (rows, V), generator=generator) / 16).float()
    targets = torch.randint(0, V, (rows,), generator=generator)
    logits[:, 7] = logits[:, 150] = 0.0
    targets[targets == 7] = 8
    logits[::3, 40:90] = float("-inf")
    targets[:3] = torch.tensor([0, 299, 128])
    logits.scatter_(1, targets[:, None], torch.tensor(MARGINS)[:, None])
    return logits + offset, targets


class Exact:
    """The float64 answer for logits (R, V): log p and H (R,), and their gradients by the logits (R, V)."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        u, self.columns = logits.double(), targets[:, None]
        x = u.gather(1, self.columns).squeeze(1)
        others = u.scatter(1, self.columns, float("-inf"))
        lse = others.logsumexp(1)
        self.logprobs, self.q = F.logsigmoid(x - lse), torch.sigmoid(lse - x)
        self.share = (others - lse[:, None]).exp()  # of the others, given that it is one of them
        self.p = (self.share * self.q[:, None]).scatter(1, self.columns, torch.sigmoid(x - lse)[:, None])
        self.logp = (others - lse[:, None] + F.logsigmoid(lse - x)[:, None]).scatter(
            1, self.columns, self.logprobs[:, None]
        )
        self.entropy = -torch.where(self.p > 0, self.p * self.logp, 0.0).sum(1)

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights[r] · d log p_r / d logits (R, V)."""
        du = (-self.p).scatter(1, self.columns, self.q[:, None])
        return du * weights.double()[:, None]

    def entropy_gradient(self) -> torch.Tensor:
        return torch.where(self.p > 0, -self.p * (self.logp + self.entropy[:, None]), 0.0)


def assert_near(got: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Every number to `tolerance` of itself."""
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=TINY)


def assert_rows_near(got: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Every row to `tolerance` of its norm."""
    away, size = (got.double() - exact).norm(dim=1), exact.norm(dim=1)
    assert (away <= tolerance * size + TINY).all(), (away / size).tolist()


# exp(u − lse) of a float32 u − lse near 40 has an error of 2e-6 of itself; near 0 of 6e-8.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_selective(offset, backend):
    logits, targets = confident_rows(offset)
    exact = Exact(logits, targets)
    logits.requires_grad_()
    logprobs = selective_log_softmax(logits, targets, backend=backend)
    logprobs.sum().backward()
    assert_near(logprobs, exact.logprobs, 1e-6)
    # Where logits are rounded to 1e-3 they are still exact; u − lse is not rounded twice.
    assert_near(logits.grad, exact.gradient(torch.ones(len(targets))), TOLERANCE[torch.float32])


def test_entropy(backend):
    """A row that is sure of its target has an entropy of (1 − p) · margin, and a gradient of that order."""
    logits, targets = confident_rows()
    exact = Exact(logits, targets)
    logits.requires_grad_()
    _, entropy = selective_log_softmax_and_entropy(logits, targets, backend=backend)
    entropy.sum().backward()
    assert_near(entropy, exact.entropy, 2e-6)
    sure = exact.q < 0.9
    assert_rows_near(logits.grad[sure], exact.entropy_gradient()[sure], 1e-5)


def head(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Exact]:
    """Hidden states (R, R), a weight (V, R) and targets (R,), whose logits are the rows of `confident_rows`."""
    logits, targets = confident_rows()
    logits[logits == float("-inf")] = -12.0  # a product of 0 and −inf would be NaN
    logits = logits.to(dtype).float()
    hidden = torch.eye(len(targets), dtype=dtype).requires_grad_()
    return hidden, logits.t().to(dtype).contiguous().requires_grad_(), targets, Exact(logits, targets)


def by_logprob(weights, **options):
    def loss(hidden, weight, targets):
        return (linear_logprob(hidden, weight, targets, **options).logprobs * weights).sum()

    return loss


def by_cross_entropy(weights, **options):
    def loss(hidden, weight, targets):
        return (-linear_cross_entropy(hidden, weight, targets, reduction="none", **options) * weights).sum()

    return loss


def by_summed_cross_entropy(weights, **options):
    def loss(hidden, weight, targets):
        return -linear_cross_entropy(hidden, weight, targets, reduction="sum", **options)

    return loss


def by_token_loss(weights, **options):
    def loss(hidden, weight, targets):
        def weighted(scores, rows):
            return (scores.logprobs * weights[rows]).sum()

        return linear_token_loss(hidden, weight, targets, weighted, **options).loss

    return loss


def by_groups(weights, **options):
    return by_token_loss(weights, group_sizes=[5, 0, len(weights) - 5], **options)


OPS = [by_logprob, by_cross_entropy, by_summed_cross_entropy, by_token_loss, by_groups]


@pytest.mark.parametrize("workspace_bytes", [None, 20_000], ids=["kept", "computed again"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_head(op, dtype, frozen, workspace_bytes, backend):
    """Each row of hidden's gradient, whose norm spans 40 orders of magnitude, and each column of the weight's."""
    hidden, weight, targets, exact = head(dtype)
    weight.requires_grad_(not frozen)
    weights = torch.ones(len(targets)) if op is by_summed_cross_entropy else torch.linspace(1, 2, len(targets))
    loss = op(weights, backend=backend, workspace_bytes=workspace_bytes)(hidden, weight, targets)
    loss.backward()
    assert_near(loss, (exact.logprobs * weights.double()).sum(), 1e-6)
    du = exact.gradient(weights)
    # 16-bit gradients of logits are rounded before they are multiplied: what cancels is left with their rounding.
    rounding = TOLERANCE[dtype] * du.abs() @ weight.detach().double().abs()
    assert ((hidden.grad.double() - du @ weight.detach().double()).abs() <= rounding + TINY).all()
    if not frozen:
        assert_near(weight.grad, du.t(), TOLERANCE[dtype])


def test_the_sum_of_small_losses(backend):
    """Only sure rows: nothing large hides the error of their losses."""
    hidden, weight, targets, exact = head(torch.float32)
    sure = torch.tensor(MARGINS) >= 17
    loss = linear_cross_entropy(hidden[sure], weight, targets[sure], reduction="sum", backend=backend)
    assert_near(loss, -exact.logprobs[sure].sum(), 1e-6)


def test_sparse_gradient(backend):
    """Of a threshold that keeps everything there is."""
    hidden, weight, targets, exact = head(torch.float32)
    options = {"head_grad": "sparse", "sparse_threshold": 1e-9, "backend": backend}
    if backend == "triton":
        with pytest.raises(RuntimeError, match="backend='triton': head_grad='sparse' has kernels for"):
            linear_logprob(hidden, weight, targets, **options)
        return
    linear_logprob(hidden, weight, targets, **options).logprobs.sum().backward()
    du = exact.gradient(torch.ones(len(targets)))
    away = (weight.grad.double() - du.t()).abs()
    assert (away <= 2e-9 + 1e-5 * du.t().abs()).all()
    at_target = weight.grad.t().gather(1, exact.columns)
    assert_near(at_target, du.gather(1, exact.columns), 1e-6)
