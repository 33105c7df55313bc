"""Computes log-probabilities of chosen tokens from logits that exist already (of a model's own forward)."""

from __future__ import annotations

from typing import Protocol

import torch

from .backends import choose_backend
from .device import device_facts
from .head.logit_transform import LogitTransform
from .head.row_kernels import row_kernels
from .head.row_statistics import (
    ENTROPY,
    ENTROPY_ROW,
    LOGPROB_ROW,
    LSE_ROW,
    NUM_STATISTICS,
    row_coefficients,
)
from .head.sweep import finish_scores, new_state
from .named_gradients import AutogradContext, first_derivative, gradients_of
from .validation import check_finite, check_selective_inputs, check_target_range


@torch.library.custom_op("trl_fast::selective_scores", mutates_args=())
def _selective_scores(
    logits: torch.Tensor, index: torch.Tensor, inv_temperature: float, outputs: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns logprobs, entropy, (R,) float32 each, and all statistics (7, R), of logits (R, V) and index (R,).

    entropy is NaN unless `outputs` asks for it.
    """
    state = new_state(logits.shape[0], logits.device)
    row_kernels(backend, logits.device).scores(logits, index, None, 1.0, 0.0, inv_temperature, outputs, 0, state)
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    statistics = finish_scores(state, outputs, logits.shape[1], sum_dtype)
    return statistics[LOGPROB_ROW].clone(), statistics[ENTROPY_ROW].clone(), statistics


@_selective_scores.register_fake
def _(
    logits: torch.Tensor, index: torch.Tensor, inv_temperature: float, outputs: int, backend: str
) -> tuple[torch.Tensor, ...]:
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = [logits.new_empty(logits.shape[0], dtype=sum_dtype) for _ in range(2)]
    return (*rows, logits.new_empty((NUM_STATISTICS, logits.shape[0]), dtype=sum_dtype))


@torch.library.custom_op("trl_fast::selective_scores_backward", mutates_args=())
def _selective_scores_backward(
    logits: torch.Tensor,
    index: torch.Tensor,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    inv_temperature: float,
    backend: str,
) -> torch.Tensor:
    """Computes the gradient of logits (R, V) from row coefficients (4, R), see row_kernels.py."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_kernels(backend, logits.device).grad(logits, index, None, 1.0, 0.0, inv_temperature, lse, coefficients, 0, out)
    return out


@_selective_scores_backward.register_fake
def _(logits: torch.Tensor, *options: object) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside tensors."""

    inv_temperature: float
    backend: str


def _setup_context(
    ctx: _Context, inputs: tuple[torch.Tensor, torch.Tensor, float, int, str], output: tuple[torch.Tensor, ...]
) -> None:
    logits, index, ctx.inv_temperature, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, index, output[2])


@first_derivative("selective_log_softmax")
def _backward(
    ctx: _Context,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    _: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    logits, index, statistics = ctx.saved_tensors
    upstream = {"grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy}
    coefficients = row_coefficients(statistics, logits.shape[-1], **upstream)
    given = (logits, index, statistics[LSE_ROW], coefficients)
    gradient = _selective_scores_backward(*given, ctx.inv_temperature, ctx.backend)
    return gradients_of("trl_fast::selective_scores", logits=gradient)


_selective_scores.register_autograd(_backward, setup_context=_setup_context)


def _selective(
    logits: torch.Tensor, index: torch.Tensor, temperature: float, outputs: int, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    inv_temperature = LogitTransform.of(temperature=temperature).inv_temperature
    check_selective_inputs(logits, index)
    check_target_range(index, logits.shape[-1], "index")
    backend = choose_backend("selective_log_softmax", backend, device_facts(logits.device), logits.dtype)
    rows = _rows_of(logits)
    logprobs, entropy, _ = _selective_scores(rows, index.reshape(-1).long(), inv_temperature, outputs, backend)
    return logprobs.view(index.shape), entropy.view(index.shape)


def _several(logits: torch.Tensor, index: torch.Tensor, temperature: float, backend: str | None) -> torch.Tensor:
    """Returns the log-probabilities (..., K) float32 of several tokens a row, by one sweep of the logits (..., V)."""
    inv_temperature = LogitTransform.of(temperature=temperature).inv_temperature
    for column in index.movedim(-1, 0):
        check_selective_inputs(logits, column)
    check_target_range(index, logits.shape[-1], "index")
    backend = choose_backend("selective_log_softmax", backend, device_facts(logits.device), logits.dtype)
    rows, tokens = _rows_of(logits), index.reshape(-1, index.shape[-1]).long()
    chosen = rows.gather(-1, tokens).to(torch.promote_types(rows.dtype, torch.float32)) * inv_temperature
    if not tokens.shape[-1]:
        return chosen.view(index.shape)
    # The likeliest of a row's tokens, so that a token near probability 1 keeps its exact value and gradient; the
    # others differ from it by their logits.
    likeliest = chosen.detach().argmax(-1, keepdim=True)
    first, _, _ = _selective_scores(rows, tokens.gather(-1, likeliest)[:, 0], inv_temperature, 0, backend)
    largest = chosen.gather(-1, likeliest)
    is_other = torch.arange(tokens.shape[-1], device=tokens.device) != likeliest
    below = torch.where(is_other & (largest > -torch.inf), chosen - largest, 0.0)
    return (first[:, None] + below).view(index.shape)


def _rows_of(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits (..., V) as rows (R, V), each of them contiguous."""
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(-1) != 1:
        # An empty tensor counts as contiguous whatever its strides.
        rows = rows.clone(memory_format=torch.contiguous_format)
    check_finite(rows, "logits", masked=True)
    return rows


def selective_log_softmax(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Computes `log_softmax(logits / temperature, -1)` gathered at `index`, with no [..., V] intermediate.

    Args:
        logits: (..., V) float32|bfloat16|float16; -inf rules a token out.
        index: (...) integer in [0, V), or (..., K) for several tokens a row, by the same sweep.
        row_mask: of the index's shape; where it is 0, the index may be anything and the result is 0.

    Returns:
        Of the index's shape, float32, differentiable.

    Raises:
        ValueError: a shape, dtype, device, index or the temperature is not as above; with TRL_FAST_CHECK=1 also if a
            logit is NaN or +inf. On a GPU the index's values are looked at only then, and what lies outside is NaN.
        RuntimeError: the forced backend cannot serve.
    """
    index = _without_masked(index, row_mask)
    if index.dim() == logits.dim() and index.dim() > 1:
        return _masked(_several(logits, index, temperature, backend), row_mask)
    return _masked(_selective(logits, index, temperature, 0, backend)[0], row_mask)


def selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes what selective_log_softmax does, and each row's entropy (...) in nats; both differentiable.

    logits: (..., V) float32|bfloat16|float16; index: (...) integer. entropy_requires_grad: False detaches the entropy.
    row_mask: (...); where it is 0, the index may be anything and both results are 0.
    """
    logprobs, entropy = _selective(logits, _without_masked(index, row_mask), temperature, ENTROPY, backend)
    entropy = entropy if entropy_requires_grad else entropy.detach()
    return _masked(logprobs, row_mask), _masked(entropy, row_mask)


def _without_masked(index: torch.Tensor, row_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the index with token 0 where the mask is 0; both of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if row_mask is None:
        return index
    if row_mask.shape != index.shape:
        shapes = f"shape {tuple(row_mask.shape)}, expected that of index, {tuple(index.shape)}"
        raise ValueError(f"row_mask: {shapes}")
    return index.masked_fill(row_mask == 0, 0)


def _masked(values: torch.Tensor, row_mask: torch.Tensor | None) -> torch.Tensor:
    return values if row_mask is None else values.masked_fill(row_mask == 0, 0.0)
