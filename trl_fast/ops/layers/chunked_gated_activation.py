"""Multiplies the activated first half of rows by the second half, as MLPs with one `gate_up_proj` do (Phi-3, GLM).

The halves are read where they lie, and their gradients are written into one tensor.
"""

from __future__ import annotations

import torch

from trl_fast.kernels.shared_constants import ACTIVATIONS

from ..backends import choose_backend
from ..device import device_facts
from ..eager_ops import eager_op
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext
from .gated_activation import BACKWARD, FORWARD


def _backend(gate_up: torch.Tensor, backend: str | None) -> str:
    return choose_backend("gated_activation", backend, device_facts(gate_up.device), gate_up.dtype)


@torch.library.custom_op("trl_fast::chunked_gated_activation", mutates_args=())
def _chunked_gated_activation(gate_up: torch.Tensor, activation: str, backend: str | None) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return FORWARD[_backend(gate_up, backend)](gate, up, activation)


@_chunked_gated_activation.register_fake
def _(gate_up: torch.Tensor, activation: str, backend: str | None) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("trl_fast::chunked_gated_activation_backward", mutates_args=())
def _chunked_gated_activation_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: str, backend: str | None
) -> torch.Tensor:
    out = reused_empty(gate_up.shape, gate_up.dtype, gate_up.device)
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    BACKWARD[_backend(gate_up, backend)](grad, gate, up, activation, grad_gate, grad_up)
    return out


@_chunked_gated_activation_backward.register_fake
def _(grad: torch.Tensor, gate_up: torch.Tensor, activation: str, backend: str | None) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape)


class _Context(AutogradContext):
    choices: tuple[str, str | None]


def _setup_context(ctx: _Context, inputs: tuple[torch.Tensor, str, str | None], output: torch.Tensor) -> None:
    gate_up, activation, backend = inputs
    ctx.choices = (activation, backend)
    ctx.save_for_backward(gate_up)


def _backward(ctx: _Context, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (gate_up,) = ctx.saved_tensors
    return _chunked_gated_activation_backward(grad, gate_up, *ctx.choices), None, None


_chunked_gated_activation.register_autograd(_backward, setup_context=_setup_context)


def chunked_gated_activation(
    gate_up: torch.Tensor, activation: str = "silu", *, backend: str | None = None
) -> torch.Tensor:
    """Computes activation(gate) · up of the halves of each row.

    Args:
        gate_up: (..., 2 I), gate first, any strides and float dtype.
        activation, backend: those of `gated_activation`.

    Returns:
        (..., I), dtype of gate_up, contiguous; differentiable, once.

    Raises:
        ValueError: the shape, dtype or the activation is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: unknown name {activation!r}; expected one of {ACTIVATIONS}")
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"gate_up: expected floats of shape (..., 2 I), got {gate_up.dtype} {tuple(gate_up.shape)}")
    if op := eager_op("gated_activation", gate_up, backend, "chunked_gated_activation"):
        return op(gate_up, ACTIVATIONS.index(activation))
    return _chunked_gated_activation(gate_up, activation, backend)
