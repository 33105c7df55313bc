"""Holds the kernels of layers on GPUs, run without one, to their PyTorch twins and to float64.

`kernels` has functions with the names and arguments of kernels/layer_kernels.py and rotary_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import ACTIVATIONS, NORM_CASTS, PAIRS
from trl_fast.ops.layers.gated_activation import _BACKWARD_OF, _FORWARD_OF
from trl_fast.ops.layers.norm_casts import norm_backward_reference, norm_reference
from trl_fast.ops.layers.rotations import turn_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row, odd widths, widths of each way to share a row among threads, and one that no thread's registers hold.
NORM_SHAPES = ((1, 1), (5, 7), (37, 128), (3, 900), (9, 896), (2, 4096), (3, 5000))
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Returns normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns room that nobody has written to: NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)


def poisoned_by_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns such room for heads (B, heads, T, D), a view of (B, T, heads, D)."""
    return poisoned((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype).transpose(1, 2)


def hold(got: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor, what: object = "") -> None:
    """Asserts that the error is at most twice that of the twin in the same dtype, and two roundings."""
    assert got.shape == twin.shape and torch.isfinite(got).all(), what
    if got.numel() == 0:
        return
    rounding = torch.finfo(twin.dtype).eps * exact.abs().max()
    error, allowed = (got.double() - exact).abs(), (twin.double() - exact).abs()
    assert error.max() <= 2 * (allowed.max() + rounding), (what, error.max(), allowed.max())


def _exact_norm(x: torch.Tensor, weight: torch.Tensor | None, cast: str) -> torch.Tensor:
    factor = 1.0 if weight is None else weight + 1 if cast == "gemma" else weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * factor


def _exact_gradients(function: Any, given: list[torch.Tensor], grads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in given]
    outs = function(*leaves)
    return torch.autograd.grad(outs, leaves, [grad.double() for grad in grads])


def check_norm(
    kernels: Any, shape: tuple[int, int], dtype: torch.dtype, cast: str, *, has_weight: bool = True
) -> None:
    """Checks the norm of rows and its gradients."""
    number, x = NORM_CASTS.index(cast), draw(*shape, dtype=dtype)
    weight = draw(shape[1], dtype=dtype, seed=1) if has_weight else None
    out, rstd = poisoned(shape, dtype), poisoned(shape[:1])
    kernels.rms_norm(x, None, weight, EPS, number, out, None, rstd)
    twin, twin_rstd = norm_reference(x, weight, EPS, cast)
    exact = _exact_norm(x.double(), None if weight is None else weight.double(), cast)
    hold(out, twin, exact, "out")
    torch.testing.assert_close(rstd, twin_rstd, rtol=1e-6, atol=0)

    grad = draw(*shape, dtype=dtype, seed=2)
    grad_x, partials = poisoned(shape, dtype), poisoned((min(3, shape[0]), shape[1])) if has_weight else None
    kernels.rms_norm_backward(grad, None, x, weight, rstd, number, grad_x, partials)
    by_x, by_weight = norm_backward_reference(grad, x, weight, twin_rstd, cast)
    given = [x] if weight is None else [x, weight]
    exact_grads = _exact_gradients(lambda x, w=None: (_exact_norm(x, w, cast),), given, [grad])
    hold(grad_x, by_x, exact_grads[0], "grad_x")
    if partials is not None:
        hold(partials.sum(0).to(dtype), by_weight, exact_grads[1], "grad_weight")
        alone = poisoned((min(3, shape[0]), shape[1]))
        kernels.rms_norm_backward(grad, None, x, weight, rstd, number, None, alone)
        assert torch.equal(alone, partials)


def check_residual_norm(kernels: Any, shape: tuple[int, int], dtype: torch.dtype, cast: str = "llama") -> None:
    """Checks the norm of a sum: rows of wider matrices, and gradients of norm and sum."""
    number, width = NORM_CASTS.index(cast), shape[1]
    both = draw(shape[0], 2 * width, dtype=dtype)
    x, residual = both[:, :width], both[:, width:]
    weight, total_twin = draw(width, dtype=dtype, seed=1), x + residual
    out, total, rstd = poisoned(shape, dtype), poisoned(shape, dtype), poisoned(shape[:1])
    kernels.rms_norm(x, residual, weight, EPS, number, out, total, rstd)
    assert torch.equal(total, total_twin)
    twin, twin_rstd = norm_reference(total_twin, weight, EPS, cast)
    hold(out, twin, _exact_norm(total_twin.double(), weight.double(), cast), "out")

    grads = draw(shape[0], 2 * width, dtype=dtype, seed=2)
    grad, grad_sum, grad_x = grads[:, width:], grads[:, :width], poisoned(shape, dtype)
    kernels.rms_norm_backward(grad, grad_sum, total, weight, rstd, number, grad_x, None)
    by_x, _ = norm_backward_reference(grad, total_twin, weight, twin_rstd, cast)
    exact = _exact_gradients(lambda x: (_exact_norm(x, weight.double(), cast), x), [total_twin], [grad, grad_sum])
    hold(grad_x, by_x + grad_sum, exact[0], "grad_x")


def _exact_gate(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    return _FORWARD_OF[name](gate) * up


def check_gate(kernels: Any, shape: tuple[int, int], dtype: torch.dtype, name: str, *, halves: bool) -> None:
    """Checks a gated activation; halves: gate and up, and their gradients, are those of one tensor."""
    rows, columns = shape
    both = 4 * draw(rows, 2 * columns, dtype=dtype)
    gate, up = both[:, :columns], both[:, columns:]
    gate[0, :5] = torch.tensor([0.0, 100.0, -100.0, -20.0, 20.0])
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    out, number = poisoned(shape, dtype), ACTIVATIONS.index(name)
    kernels.gated_activation(gate, up, number, out)
    hold(out, _FORWARD_OF[name](gate) * up, _exact_gate(gate.double(), up.double(), name), "out")

    grad, grads = draw(*shape, dtype=dtype, seed=2), poisoned((rows, 2 * columns), dtype)
    by_gate, by_up = grads[:, :columns], grads[:, columns:]
    if not halves:
        by_gate, by_up = poisoned(shape, dtype), poisoned(shape, dtype)
    kernels.gated_activation_backward(grad, gate, up, number, by_gate, by_up)
    exact = _exact_gradients(lambda gate, up: (_exact_gate(gate, up, name),), [gate, up], [grad])
    hold(by_gate, _BACKWARD_OF[name](grad * up, gate), exact[0], "grad_gate")
    hold(by_up, grad * _FORWARD_OF[name](gate), exact[1], "grad_up")


# B, heads, T, D, and how many of the D numbers are turned.
HEAD_SHAPES = ((2, 3, 5, 16, 16), (1, 1, 1, 6, 4), (2, 4, 3, 128, 128), (1, 2, 3, 96, 24), (1, 2, 2, 256, 64))


def _heads(shape: tuple[int, ...], dtype: torch.dtype, angle_dtype: torch.dtype, one_angle: bool) -> Any:
    batch, heads, tokens, width, turned = shape
    x = draw(batch, tokens, 2 * heads, width, dtype=dtype)[:, :, :heads].transpose(1, 2)
    angles = (batch, tokens, turned // 2 if one_angle else turned)
    cos, sin = draw(*angles, dtype=angle_dtype, seed=3), draw(*angles, dtype=angle_dtype, seed=4)
    return x, cos[:1], sin


def check_rotary(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, pairs: str, *, one_angle: bool, upcast: bool
) -> None:
    """Checks that heads are turned, and back, to the bit where every product is rounded."""
    x, cos, sin = _heads(shape, dtype, torch.float32 if upcast else dtype, one_angle)
    for is_backward in (False, True):
        out = poisoned_by_tokens(x)
        kernels.rotary(x, cos, sin, PAIRS.index(pairs), one_angle, upcast, is_backward, out)
        twin = turn_reference(x, cos, sin, pairs, one_angle, upcast, is_backward)
        given = (t.double() for t in (x, cos, sin))
        hold(out, twin, turn_reference(*given, pairs, one_angle, False, is_backward), is_backward)
        assert upcast or torch.equal(out, twin)


def check_norm_rotary(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, cast: str, pairs: str, *, one_angle: bool, upcast: bool
) -> None:
    """Checks heads that are normalised and turned, and their gradients."""
    x, cos, sin = _heads(shape, dtype, torch.float32 if upcast else dtype, one_angle)
    batch, heads, tokens, width = x.shape
    rows, weight, number = batch * heads * tokens, draw(width, dtype=dtype, seed=1), NORM_CASTS.index(cast)
    way = (cos, sin, PAIRS.index(pairs), one_angle, upcast)
    out, rstd = poisoned_by_tokens(x), poisoned((rows,))
    kernels.norm_rotary(x, weight, EPS, number, *way, out, rstd)
    normed, twin_rstd = norm_reference(x.transpose(1, 2), weight, EPS, cast)
    turn = (cos, sin, pairs, one_angle, upcast)
    twin = turn_reference(normed.transpose(1, 2), *turn, False)
    upcast_turn = (cos.double(), sin.double(), pairs, one_angle, False)

    def exact(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
        return (turn_reference(_exact_norm(x, weight, cast), *upcast_turn, False),)

    hold(out, twin, exact(x.double(), weight.double())[0], "out")
    torch.testing.assert_close(rstd, twin_rstd, rtol=1e-6, atol=0)

    grad = draw(batch, heads, tokens, width, dtype=dtype, seed=2)
    grad_x, partials = poisoned_by_tokens(x), poisoned((min(3, rows), width))
    kernels.norm_rotary_backward(grad, x, weight, rstd, number, *way, grad_x, partials)
    turned_back = turn_reference(grad, *turn, True).transpose(1, 2)
    by_x, by_weight = norm_backward_reference(turned_back, x.transpose(1, 2), weight, twin_rstd, cast)
    exact_grads = _exact_gradients(exact, [x, weight], [grad])
    hold(grad_x, by_x.transpose(1, 2), exact_grads[0], "grad_x")
    hold(partials.sum(0).to(dtype), by_weight, exact_grads[1], "grad_weight")
    alone = poisoned_by_tokens(x)
    kernels.norm_rotary_backward(grad, x, weight, rstd, number, *way, alone, None)
    assert torch.equal(alone, grad_x)


def check_nothing(kernels: Any) -> None:
    """Runs every kernel on no row."""
    rows, none = torch.empty(0, 8), torch.empty(0)
    kernels.rms_norm(rows, rows, torch.ones(8), EPS, 0, rows, rows, none)
    kernels.rms_norm_backward(rows, rows, rows, torch.ones(8), none, 0, rows, torch.empty(0, 8))
    kernels.gated_activation(rows, rows, 0, rows)
    kernels.gated_activation_backward(rows, rows, rows, 0, rows, rows)
    heads, way = torch.empty(1, 2, 0, 8), (torch.empty(1, 0, 8), torch.empty(1, 0, 8), 0, False, False)
    kernels.rotary(heads, *way, False, heads)
    kernels.norm_rotary(heads, torch.ones(8), EPS, 0, *way, heads, none)
    kernels.norm_rotary_backward(heads, heads, torch.ones(8), none, 0, *way, heads, torch.empty(0, 8))
