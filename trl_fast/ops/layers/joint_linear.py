"""Applies several linear layers to one input: queries, keys and values, or an MLP's gate and up; with adapters or not.

Autograd would compute each layer's gradient by the input, and add them one by one. Here later products are summed into
the first one's result by the products themselves, which round once where a sum of its own rounds again. What layers
give is what they give alone, to the bit. Backward keeps x once, and of each low-rank adapter s x Aᵀ.

The adapters' gradients by x are one product, as those by each A are, so that x and its gradient are read once for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..device import device_facts
from ..eager_ops import eager_linear
from ..linear import MIN_ROWS, linear
from ..matmul import add_mm, as_autocast, new_product
from ..named_gradients import AutogradContext, first_derivative


class Adapter(NamedTuple):
    """Holds a layer's low-rank adapter, lora_a (r, H) and lora_b (V, r), and what their product is multiplied by."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float

    def as_autocast(self, dtype: torch.dtype) -> Adapter:
        """Returns the adapter as autocast hands it to products."""
        return Adapter(as_autocast(self.lora_a, dtype), as_autocast(self.lora_b, dtype), self.scaling)


class _Context(AutogradContext):
    scalings: tuple[float, ...]


class _JointLinear(torch.autograd.Function):
    """Takes x (..., H), n scalings, then n each of weights (V, H), biases (V,), lora_a (r, H) and lora_b (V, r).

    All but the weights may be None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scalings: tuple[float, ...], *parts: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        weights, biases, lora_as, lora_bs = _by_kind(parts, len(scalings))
        needs_x, _, *needs = ctx.needs_input_grad
        needs_weights, _, needs_as, _ = _by_kind(needs, len(scalings))
        layers = zip(weights, biases, lora_as, lora_bs, scalings, strict=True)
        made, lows = zip(*(_apply(x, *layer) for layer in layers), strict=True)
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if any((*needs_weights, *needs_as)) else None,
            *(weights if needs_x else [None] * len(weights)),
            *lora_as,
            *lora_bs,
            *lows,
        )
        return made

    @staticmethod
    @first_derivative("joint_linear")
    def backward(ctx: _Context, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (x, *kept), count = ctx.saved_tensors, len(grads)
        weights, lora_as, lora_bs, lows = _by_kind(kept, count)
        needs_x, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases, needs_as, needs_bs = _by_kind(needs, count)
        by_parts: list[list[torch.Tensor | None]] = [[None] * count for _ in range(4)]
        by_weights, by_biases, by_as, by_bs = by_parts
        by_x: Any = None
        by_lows: dict[int, torch.Tensor] = {}
        for at, upstream in enumerate(grads):
            if upstream is None:
                continue
            shape, grad = upstream.shape[:-1], upstream.reshape(-1, upstream.shape[-1])
            if needs_x and by_x is None:
                by_x = new_product(grad, weights[at])
            elif needs_x:
                add_mm(by_x, grad, weights[at])
            if needs_weights[at]:
                by_weights[at] = new_product(grad.t(), _rows(x))
            if needs_biases[at]:
                by_biases[at] = grad.sum(0)
            if needs_bs[at]:
                by_bs[at] = new_product(lows[at].t(), grad).t().contiguous()
            if lora_as[at] is not None and (needs_x or needs_as[at]):
                by_lows[at] = new_product(grad, lora_bs[at]).mul_(ctx.scalings[at])
        if by_lows:
            by_low = torch.cat([*by_lows.values()], dim=1)
            if needs_x:
                add_mm(by_x, by_low, torch.cat([lora_as[at] for at in by_lows]))
            if any(needs_as):
                by_a = new_product(by_low.t(), _rows(x)).split([len(lora_as[at]) for at in by_lows])
                for at, rows in zip(by_lows, by_a, strict=True):
                    # Of its own memory: an engine may take a gradient for all of its storage.
                    by_as[at] = rows.clone()
        return None if by_x is None else by_x.view(*shape, by_x.shape[-1]), None, *itertools.chain(*by_parts)


def _by_kind(parts: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Returns what stands for weights, biases, lora_a and lora_b, or the like, of so many layers."""
    return [parts[at : at + count] for at in range(0, len(parts), count)]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x (..., H) as (R, H)."""
    return x.reshape(-1, x.shape[-1])


def _apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns a layer's result (..., V), and s x Aᵀ (R, r) if it has an adapter."""
    if lora_a is not None:
        return torch.ops.trl_fast.lora_linear(x, weight, bias, lora_a, lora_b, scaling)
    rows = _rows(x)
    own = device_facts(x.device).own_products and x.dtype == torch.float32 and len(rows) >= MIN_ROWS
    apply: Any = linear if own else F.linear
    # No view for autograd, as of `F.linear`: who gets it may write to it.
    return torch.ops.aten._unsafe_view(apply(rows, weight, bias), [*x.shape[:-1], weight.shape[0]]), None


def joint_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    adapters: Sequence[Adapter | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Computes x Wᵀ + b for each weight and bias, as `F.linear` does, and with an adapter as `lora_linear` does.

    Args:
        x: (..., H); weights: (V, H) each, biases: (V,) or None each: one float dtype. Under autocast each may have
            another dtype, none wider than float32.
        adapters: one or None for each weight, of the same dtype; None: no layer has one.

    Returns:
        (..., V) each, dtype of x or of autocast, contiguous; differentiable by all tensors, once.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    adapters = [None] * len(weights) if adapters is None else adapters
    if x.dim() < 1 or x.shape[-1] < 1 or not 0 < len(weights) == len(biases) == len(adapters):
        raise ValueError(
            f"x: expected (..., H), and as many biases and adapters as weights, got {tuple(x.shape)}, "
            f"{len(biases)} and {len(adapters)} for {len(weights)}"
        )
    lora_as = [None if adapter is None else adapter.lora_a for adapter in adapters]
    lora_bs = [None if adapter is None else adapter.lora_b for adapter in adapters]
    scalings = [1.0 if adapter is None else float(adapter.scaling) for adapter in adapters]
    if (eager := eager_linear("joint_linear", x)) is not None:
        return tuple(eager(x, weights, biases, lora_as, lora_bs, scalings))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return joint_linear(
                as_autocast(x, dtype),
                [as_autocast(weight, dtype) for weight in weights],
                [None if bias is None else as_autocast(bias, dtype) for bias in biases],
                [None if adapter is None else adapter.as_autocast(dtype) for adapter in adapters],
            )
    for weight, bias, adapter in zip(weights, biases, adapters, strict=True):
        _check_layer(x, weight, bias, adapter)
    return _JointLinear.apply(x, tuple(scalings), *weights, *biases, *lora_as, *lora_bs)


def _check_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: Adapter | None) -> None:
    """Raises ValueError where a layer's tensors do not fit x (..., H), or have another dtype."""
    outputs, inputs = weight.shape[:1].numel(), x.shape[-1]
    parts = [("weights", weight, (outputs, inputs)), ("biases", bias, (outputs,))]
    if adapter is not None:
        rank = adapter.lora_a.shape[:1].numel()
        parts += [("adapters", adapter.lora_a, (rank, inputs)), ("adapters", adapter.lora_b, (outputs, rank))]
    for name, tensor, shape in parts:
        if tensor is not None and (tensor.dtype != x.dtype or tuple(tensor.shape) != shape):
            raise ValueError(f"{name}: expected {x.dtype} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
