"""Multiplies an activated gate by a second vector (SwiGLU, GeGLU: arXiv 2002.05202), and keeps nothing but the two.

The activation is computed in float32 and rounded to the dtype before the product, as PyTorch does it. Backward
computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trl_fast.kernels.shared_constants import ACTIVATIONS, Activation

from ..backends import choose_backend
from ..device import device_facts
from ..eager_ops import eager_op
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext
from .kernels import by_kernels, layer_kernel


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_FORWARD_OF: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
}
_BACKWARD_OF: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward.default(grad, x, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward.default,
}


def _forward_in_torch(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return (_FORWARD_OF[activation](gate) * up).contiguous()


def _as_matrices(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Returns tensors of one shape (..., I) as (R, I) of one stride: views where that can be, else copies."""
    width = tensors[0].shape[-1] if tensors[0].dim() and tensors[0].numel() else 1
    rows = [t.reshape(-1, width) for t in tensors]
    alike = len({t.stride(0) for t in rows}) == 1 and (width == 1 or all(t.stride(1) == 1 for t in rows))
    return rows if alike else [t.contiguous() for t in rows]


def _forward_by_kernel(backend: str, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    out = reused_empty(gate.shape, gate.dtype, gate.device)
    rows = _as_matrices(gate, up)
    layer_kernel("gated_activation", backend)(*rows, ACTIVATIONS.index(activation), out.view(rows[0].shape))
    return out


# By backend: (gate, up, activation) to the product.
FORWARD = {"torch": _forward_in_torch, **by_kernels(_forward_by_kernel)}


@torch.library.custom_op("trl_fast::gated_activation", mutates_args=())
def _gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str, backend: str | None) -> torch.Tensor:
    run = FORWARD[choose_backend("gated_activation", backend, device_facts(gate.device), gate.dtype)]
    return run(gate, up, activation)


@_gated_activation.register_fake
def _(gate: torch.Tensor, *_: Any) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _backward_in_torch(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
) -> None:
    grad_gate.copy_(_BACKWARD_OF[activation](grad * up, gate))
    grad_up.copy_(grad * _FORWARD_OF[activation](gate))


def _backward_by_kernel(
    backend: str,
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
) -> None:
    given = _as_matrices(gate, up)
    shape = given[0].shape
    outs = grad_gate.view(shape), grad_up.view(shape)
    layer_kernel("gated_activation_backward", backend)(
        grad.reshape(shape).contiguous(), *given, ACTIVATIONS.index(activation), *outs
    )


# By backend: (grad, gate, up, activation, grad_gate, grad_up), of which the last two are written.
BACKWARD = {"torch": _backward_in_torch, **by_kernels(_backward_by_kernel)}


@torch.library.custom_op("trl_fast::gated_activation_backward", mutates_args=())
def _gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate, grad_up = (reused_empty(gate.shape, gate.dtype, gate.device) for _ in range(2))
    run = BACKWARD[choose_backend("gated_activation", backend, device_facts(gate.device), gate.dtype)]
    run(grad, gate, up, activation, grad_gate, grad_up)
    return grad_gate, grad_up


@_gated_activation_backward.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _Context(AutogradContext):
    choices: tuple[str, str | None]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.choices = inputs[2:]
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: _Context, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *_gated_activation_backward(grad, gate, up, *ctx.choices), None, None


_gated_activation.register_autograd(_backward, setup_context=_setup_context)


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, activation: str = "silu", *, backend: str | None = None
) -> torch.Tensor:
    """Computes activation(gate) · up.

    Args:
        gate: any shape, strides and float dtype; up: the same shape and dtype.
        activation: "silu", "gelu_tanh" (the approximation by tanh) or "gelu".
        backend: one of `backends.BACKENDS`; None: the first that serves.

    Returns:
        The product, shape and dtype of gate, contiguous; differentiable by both, once.

    Raises:
        ValueError: a shape, dtype or the activation is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: unknown name {activation!r}; expected one of {ACTIVATIONS}")
    if up.shape != gate.shape or up.dtype != gate.dtype or not gate.is_floating_point():
        raise ValueError(
            f"up: expected the floats of gate, {gate.dtype} of shape {tuple(gate.shape)}, "
            f"got {up.dtype} {tuple(up.shape)}"
        )
    if op := eager_op("gated_activation", gate, backend):
        return op(gate, up, ACTIVATIONS.index(activation))
    return _gated_activation(gate, up, activation, backend)
