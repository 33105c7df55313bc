"""Computes preference losses from per-token log-probabilities: one launch forward, one backward.

The formulas are in `pair_formulas`; autograd through them is the PyTorch backend and the kernels' specification. A
kernel sums each sequence, computes each pair's loss, and keeps the loss's derivative with respect to each sequence's
log-probability, (S,), which is all that backward needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .backends import choose_backend
from .device import device_facts
from .named_gradients import AutogradContext, first_derivative, gradients_of
from .pair_formulas import PAIR_FORMULAS, PairValues, check_pair_parameters
from .validation import check_choice, check_logprobs, check_vector, refuse_forward_mode, values_are_checked


class PairLoss(NamedTuple):
    """Holds `losses` (P,) and `sequence_logprobs` (S,), both differentiable, in the dtype of the logprobs."""

    losses: torch.Tensor
    sequence_logprobs: torch.Tensor


@dataclass(frozen=True)
class _Parameters:
    beta: float
    label_smoothing: float
    discopop_tau: float


@torch.library.custom_op("trl_fast::pair_loss", mutates_args=())
def _pair_loss(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logprobs: torch.Tensor,
    lengths: torch.Tensor,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    discopop_tau: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns losses (P,), sequence_logprobs (S,) and gradients (S,) of each pair's loss by its sequence_logprobs."""
    forward: Callable[..., None]
    loss: str | int
    if backend == "cuda":
        from trl_fast import _C

        forward, loss = torch.ops.trl_fast.pair_loss_forward, _C.loss_formulas()["pair_loss"][loss_type]
    else:
        from trl_fast.kernels.loss_kernels import pair_loss_forward

        forward, loss = pair_loss_forward, loss_type
    losses = logprobs.new_empty(len(ref_logprobs) // 2)
    sequence_logprobs, gradients = torch.empty_like(ref_logprobs), torch.empty_like(ref_logprobs)
    forward(
        *(logprobs, cu_seqlens, ref_logprobs, lengths),
        *(loss, beta, label_smoothing, discopop_tau),
        *(losses, sequence_logprobs, gradients),
    )
    return losses, sequence_logprobs, gradients


@_pair_loss.register_fake
def _(
    logprobs: torch.Tensor, cu_seqlens: torch.Tensor, ref_logprobs: torch.Tensor, *others: object
) -> tuple[torch.Tensor, ...]:
    losses = logprobs.new_empty(ref_logprobs.shape[0] // 2)
    return losses, torch.empty_like(ref_logprobs), torch.empty_like(ref_logprobs)


@torch.library.custom_op("trl_fast::pair_loss_backward", mutates_args=())
def _pair_loss_backward(
    gradients: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_tokens: int,
    grad_losses: torch.Tensor | None,
    grad_sequence_logprobs: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Returns the tokens' gradient (N,): `gradients` times the pair's upstream gradient plus the sequence's."""
    backward: Callable[..., None]
    if backend == "cuda":
        backward = torch.ops.trl_fast.pair_loss_backward_out
    else:
        from trl_fast.kernels.loss_kernels import pair_loss_backward

        backward = pair_loss_backward
    out = gradients.new_empty(num_tokens)
    backward(gradients, cu_seqlens, grad_losses, grad_sequence_logprobs, out)
    return out


@_pair_loss_backward.register_fake
def _(gradients: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int, *others: object) -> torch.Tensor:
    return gradients.new_empty(num_tokens)


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside tensors."""

    num_tokens: int
    backend: str


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logprobs, cu_seqlens = inputs[:2]
    gradients = output[2]
    ctx.num_tokens, ctx.backend = logprobs.shape[0], inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gradients)
    ctx.save_for_backward(gradients, cu_seqlens)


@first_derivative("pair_loss")
def _backward(
    ctx: _Context,
    grad_losses: torch.Tensor | None,
    grad_sequence_logprobs: torch.Tensor | None,
    _grad_gradients: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    gradients, cu_seqlens = ctx.saved_tensors
    grad = None
    if grad_losses is not None or grad_sequence_logprobs is not None:
        grad = _pair_loss_backward(
            gradients, cu_seqlens, ctx.num_tokens, grad_losses, grad_sequence_logprobs, ctx.backend
        )
    return gradients_of("trl_fast::pair_loss", logprobs=grad)


_pair_loss.register_autograd(_backward, setup_context=_setup_context)


def _reference(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logprobs: torch.Tensor,
    lengths: torch.Tensor,
    loss_type: str,
    parameters: _Parameters,
) -> PairLoss:
    sequences = torch.arange(len(ref_logprobs), device=cu_seqlens.device)
    sequence = sequences.repeat_interleave(cu_seqlens.diff(), output_size=len(logprobs))
    sequence_logprobs = torch.zeros_like(ref_logprobs).index_add(0, sequence, logprobs)
    logratios = sequence_logprobs - ref_logprobs
    pairs = PairValues.from_sequences(sequence_logprobs, ref_logprobs, logratios, lengths)
    return PairLoss(PAIR_FORMULAS[loss_type](pairs, parameters), sequence_logprobs)


def _check_inputs(
    logprobs: torch.Tensor, cu_seqlens: torch.Tensor, ref_logprobs: torch.Tensor, lengths: torch.Tensor
) -> None:
    check_logprobs(logprobs)
    num_sequences = ref_logprobs.numel()
    if num_sequences % 2:
        raise ValueError(f"ref_logprobs: expected an even number of sequences, two a pair, got {num_sequences}")
    check_vector("ref_logprobs", ref_logprobs, num_sequences, logprobs)
    check_vector("cu_seqlens", cu_seqlens, num_sequences + 1, logprobs, torch.int64)
    check_vector("lengths", lengths, num_sequences, logprobs, torch.int64)
    if values_are_checked(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if (first, last) != (0, len(logprobs)) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected numbers that never fall, from 0 to the {len(logprobs)} of logprobs, "
                f"got {cu_seqlens.tolist()[:8]} … {last}"
            )


def pair_loss(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logprobs: torch.Tensor,
    lengths: torch.Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    backend: str | None = None,
) -> PairLoss:
    """Computes the loss of each preference pair, with the reverse KL as divergence (`pair_formulas`).

    S = 2P sequences: the chosen one of pair i is sequence 2i, the rejected one 2i + 1.

    Args:
        logprobs: (N,) float32 logprobs of the scored tokens, sequence by sequence (float64 for the reference).
        cu_seqlens: (S + 1,) int64, cumulative sequence lengths: the tokens of sequence s are
            [cu_seqlens[s], cu_seqlens[s + 1]). A sequence may be empty.
        ref_logprobs: (S,) float32, the sequences' log-probabilities under the reference; gets no gradient.
        lengths: (S,) int64, the token counts by which `ipo` and `sigmoid_norm` divide.
        loss_type: a name of `PAIR_FORMULAS`.
        beta, label_smoothing, discopop_tau: as in `DPOConfig`.

    Returns:
        losses (P,) and sequence_logprobs (S,), differentiable in logprobs.

    Raises:
        ValueError: a shape, dtype, device, name or number is not as above.
        RuntimeError: the forced backend cannot serve.
    """
    check_choice("loss_type", loss_type, PAIR_FORMULAS)
    parameters = _Parameters(beta, label_smoothing, discopop_tau)
    check_pair_parameters((loss_type,), parameters)
    _check_inputs(logprobs, cu_seqlens, ref_logprobs, lengths)
    vectors = (logprobs, cu_seqlens, ref_logprobs.detach(), lengths)
    backend = choose_backend("pair_loss", backend, device_facts(logprobs.device), logprobs.dtype, loss_type)
    if backend == "torch":
        return _reference(*vectors, loss_type, parameters)
    refuse_forward_mode("pair_loss", logprobs)
    losses, sequence_logprobs, _ = _pair_loss(
        *(vector.contiguous() for vector in vectors), loss_type, beta, label_smoothing, discopop_tau, backend
    )
    return PairLoss(losses, sequence_logprobs)
