"""Per-token log-probabilities straight from hidden states and the head's weight; the logits never exist whole."""

from __future__ import annotations

from dataclasses import replace

import torch

from .backends import choose_backend
from .blocks import DEFAULT_WORKSPACE_BYTES
from .linear_scores import LOGITS, NOTHING, UNIT_GRADIENT, linear_scores
from .scores import TokenScores, output_mask, token_scores
from .transform import LogitTransform
from .validation import check_finite, check_head_inputs, check_target_range


def autocast_hidden(hidden: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """`hidden` in autocast's dtype if autocast is on, and whether it is; the weight is cast later, tile by tile."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, False
    return hidden.to(torch.get_autocast_dtype(device)), True


def what_to_keep(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> int:
    """What the forward pass keeps for a backward pass, by the table in linear_scores.py."""
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_trains or hidden.requires_grad):
        return NOTHING
    return LOGITS if head_trains else UNIT_GRADIENT


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
) -> tuple[torch.Tensor, ...]:
    """Checks the inputs, chooses the backend and runs `trl_fast::linear_scores`; its six tensors."""
    hidden, autocast = autocast_hidden(hidden)
    check_head_inputs(hidden, weight, targets, bias, same_dtype=not autocast)
    check_target_range(targets, weight.shape[0])
    check_finite(hidden)
    backend = choose_backend(op, backend, hidden.device, hidden.dtype)
    workspace_bytes = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    keep = what_to_keep(hidden, weight, bias)
    return linear_scores(hidden, weight, targets.long(), bias, *transform, outputs, keep, workspace_bytes, backend)


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
        workspace_bytes: limit of the memory that grows with N · V; default 1 GiB.
        backend: force "triton", "cpp" or "torch"; None takes the best that can serve.

    Returns:
        TokenScores of (N,) tensors; float32, is_top1 bool. Outputs that were not asked for are None.

    Raises:
        ValueError: a shape, dtype, device, target, output name or number is not as above; with TRL_FAST_CHECK=1 also
            if hidden is not finite; or workspace_bytes holds no row of logits.
        RuntimeError: the forced backend cannot serve.
    """
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    _, logprobs, entropy, _, statistics, _ = differentiable_scores(
        "linear_logprob",
        hidden,
        weight,
        targets,
        bias=bias,
        transform=transform,
        outputs=output_mask(outputs),
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    scores = token_scores(statistics.detach(), outputs)
    return replace(scores, logprobs=logprobs, entropy=entropy if "entropy" in outputs else None)
