"""The SFT losses against their formulas and gradients in float64, and their metrics."""

import pytest
import torch

from trl_fast.losses.sft import TOKEN_LOSSES, token_metrics
from trl_fast.ops import TokenScores

LOGPROBS = torch.linspace(-6, -1e-3, 17, dtype=torch.float64)
EXPECTED = {
    # The loss, and its derivative by log p. In dft the probability is a constant factor.
    "nll": (-LOGPROBS, -torch.ones_like(LOGPROBS)),
    "dft": (-LOGPROBS * LOGPROBS.exp(), -LOGPROBS.exp()),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_formula_and_gradient(name):
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = TOKEN_LOSSES[name](logprobs)
    loss.backward()
    values, gradient = EXPECTED[name]
    torch.testing.assert_close(loss.detach(), values.sum())
    torch.testing.assert_close(logprobs.grad, gradient)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_no_tokens(name):
    assert TOKEN_LOSSES[name](torch.empty(0)).item() == 0


def test_metrics():
    scores = TokenScores(torch.zeros(4), entropy=torch.arange(4.0), is_top1=torch.tensor([True, False, True, True]))
    assert {name: metric.mean().item() for name, metric in token_metrics(scores).items()} == {
        "entropy": 1.5,
        "mean_token_accuracy": 0.75,
    }
    empty = TokenScores(torch.empty(0), entropy=torch.empty(0), is_top1=torch.empty(0, dtype=torch.bool))
    assert {metric.mean().item() for metric in token_metrics(empty).values()} == {0.0}
