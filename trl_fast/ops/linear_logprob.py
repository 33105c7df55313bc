"""Per-token log-probabilities straight from hidden states and the head's weight; the logits never exist whole."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .backends import choose_backend
from .head.autograd import LOGITS, NOTHING, UNIT_GRADIENT, linear_scores
from .head.logit_transform import LogitTransform
from .head.plan import workspace_of
from .head.sparse_gradient import linear_scores_sparse
from .token_scores import LSE_ROW, TokenScores, output_mask, token_scores
from .validation import check_finite, check_head_inputs, check_target_range


def autocast_hidden(hidden: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """`hidden` in autocast's dtype if autocast is on, and whether it is; the weight is cast later, tile by tile."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, False
    return hidden.to(torch.get_autocast_dtype(device)), True


def what_to_keep(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> int:
    """What the forward pass keeps for a backward pass, by the table in head/autograd.py."""
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_trains or hidden.requires_grad):
        return NOTHING
    return LOGITS if head_trains else UNIT_GRADIENT


class DifferentiableScores(NamedTuple):
    """(N,) tensors with gradients, where the kind of gradient has them, and all statistics (7, N) without."""

    lse: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor | None
    statistics: torch.Tensor


HEAD_GRADS = ("exact", "sparse")
DEFAULT_SPARSE_THRESHOLD = 2.0**-14


def check_head_grad(head_grad: str, sparse_threshold: float, device: torch.device) -> None:
    """Raises ValueError for an unknown kind of gradient, one that `device` does not have, or a bad threshold."""
    if head_grad not in HEAD_GRADS:
        raise ValueError(f"head_grad: unknown value {head_grad!r}; expected one of {HEAD_GRADS}")
    if head_grad == "sparse" and device.type != "cpu":
        raise ValueError(
            f"head_grad='sparse' has kernels for a CPU only, not for {device.type}, where it would take many times as "
            "long as the products that it spares; use head_grad='exact'"
        )
    if not 0.0 < sparse_threshold < 1.0:
        raise ValueError(f"sparse_threshold must lie between 0 and 1, got {sparse_threshold!r}")


def differentiable_scores(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: int,
    workspace_bytes: int | None,
    backend: str | None,
    head_grad: str,
    sparse_threshold: float,
) -> DifferentiableScores:
    """Checks the inputs, chooses the backend and runs `trl_fast::linear_scores` or its sparse counterpart."""
    check_head_grad(head_grad, sparse_threshold, hidden.device)
    hidden, autocast = autocast_hidden(hidden)
    check_head_inputs(hidden, weight, targets, bias, same_dtype=not autocast)
    check_target_range(targets, weight.shape[0])
    check_finite(hidden)
    backend = choose_backend(op, backend, hidden.device, hidden.dtype)
    workspace_bytes = workspace_of(workspace_bytes, hidden.device)
    keep = what_to_keep(hidden, weight, bias)
    given = (hidden, weight, targets.long(), bias)
    if head_grad == "sparse" and keep != NOTHING:
        offsets = torch.rand(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        options = (*transform, outputs, sparse_threshold, workspace_bytes, backend)
        logprobs, entropy, statistics, *_ = linear_scores_sparse(*given, offsets, *options)
        return DifferentiableScores(statistics[LSE_ROW].detach(), logprobs, entropy, None, statistics.detach())
    options = (*transform, outputs, keep, workspace_bytes, backend)
    lse, logprobs, entropy, mean_logits, statistics, *_ = linear_scores(*given, *options)
    return DifferentiableScores(lse, logprobs, entropy, mean_logits, statistics.detach())


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logprobs",),
    workspace_bytes: int | None = None,
    backend: str | None = None,
    head_grad: str = "exact",
    sparse_threshold: float = DEFAULT_SPARSE_THRESHOLD,
) -> TokenScores:
    """Log-probability of each target under softmax(cap(logit_scale · (hidden weightᵀ + bias)) / temperature).

    Args:
        hidden: (N, H) float32|bfloat16|float16, contiguous or not.
        weight: (V, H), dtype of hidden (any float dtype under autocast).
        targets: (N,) integer in [0, V).
        bias: (V,) or None.
        temperature: the logits are divided by it, last.
        softcap: cap of the logits, softcap · tanh(logits / softcap), or None.
        logit_scale: factor of the logits, first.
        outputs: names among logprobs (always there), entropy (differentiable), log_sum_sq_probs, mean_logits, is_top1.
        workspace_bytes: limit of the memory that grows with N · V; default: see head/plan.py.
        backend: force "cuda", "triton", "cpp" or "torch"; None takes the best that can serve.
        head_grad: "exact", or "sparse" for an unbiased estimate without the backward products (see
            head/sparse_kernels.py). Its random numbers come from torch's default generator.
        sparse_threshold: smaller probabilities are sampled: 2⁻¹² keeps about 300 entries a row on real text at an
            error of 0.5%, 2⁻¹⁴ about 700 at 0.2%, as much as a bfloat16 product has.

    Returns:
        TokenScores of (N,) tensors; float32, is_top1 bool. Outputs that were not asked for are None.

    Raises:
        ValueError: a shape, dtype, device, target, output name or number is not as above; or workspace_bytes holds no
            row of logits. With the environment variable TRL_FAST_CHECK=1 also if hidden is not finite; on a GPU the
            values of targets are looked at only then, and one outside the vocabulary makes its row NaN, with gradient.
        RuntimeError: the forced backend cannot serve.
    """
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    found = differentiable_scores(
        "linear_logprob",
        hidden,
        weight,
        targets,
        bias=bias,
        transform=transform,
        outputs=output_mask(outputs),
        workspace_bytes=workspace_bytes,
        backend=backend,
        head_grad=head_grad,
        sparse_threshold=sparse_threshold,
    )
    scores = token_scores(found.statistics, outputs)
    return replace(scores, logprobs=found.logprobs, entropy=found.entropy if "entropy" in outputs else None)
