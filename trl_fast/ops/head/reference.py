"""Computes the whole op in plain PyTorch: the page to read first, and what the tests hold every backend to.

The rest of this package computes the same without ever holding all N x V logits:

- plan.py cuts rows and columns into blocks and tiles that fit a workspace, and chooses dtypes; tiled_head.py holds the
  head's tensors beside its plan.
- sweep.py scores the rows tile by tile: `logits` and the statistics below. The sums of a row are kept relative to its
  largest logit so far (row_statistics.py), and logits are kept for the gradient where they fit (kept_logits.py).
- gradients.py computes `grad_logits` below tile by tile, from kept logits or from logits that are computed again, and
  sums the three gradients.
- row_kernels.py specifies the kernels that do this on one tile, and has the table of their backends; fused_kernel.py
  scores without a tile of logits in memory.
- autograd.py gives it to autograd, and sparse_gradient.py estimates the gradient from a sample instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .logit_transform import LogitTransform


class ScoresAndGradients(NamedTuple):
    """Holds logprobs and entropy (N,), and the gradients of hidden (N, H), weight (V, H) and bias (V,)."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def scores_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> ScoresAndGradients:
    """Computes the scores of N tokens, and the gradients of a loss from its derivatives by these scores.

    Args:
        hidden: (N, H), weight: (V, H), bias: (V,) or None, all float64 or float32; targets: (N,) int64.
        transform: from the product of hidden and weight to the logits.
        grad_logprobs, grad_entropy: (N,), the loss's derivatives by the log-probability and the entropy of each token.
    """
    product = hidden @ weight.t()
    logits, cap_derivative = transform.apply(product, bias)
    lse = logits.logsumexp(dim=1, keepdim=True)
    logp = logits - lse
    p = logp.exp()
    logprobs = logp.gather(1, targets[:, None]).squeeze(1)
    entropy = -(p * logp).sum(dim=1)

    # d logprob / d logits = onehot(target) - p;  d entropy / d logits = -p (logp + entropy)
    grad_logits = -grad_logprobs[:, None] * p - grad_entropy[:, None] * p * (logp + entropy[:, None])
    grad_logits.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
    grad_product = grad_logits * transform.scale * transform.inv_temperature
    if cap_derivative is not None:
        grad_product = grad_product * cap_derivative
    return ScoresAndGradients(
        logprobs, entropy, grad_product @ weight, grad_product.t() @ hidden, grad_product.sum(dim=0)
    )
