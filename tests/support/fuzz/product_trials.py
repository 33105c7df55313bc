"""Tries products of matrices by our own kernels, and linear layers."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from support.fuzz.draw import Draw
from support.fuzz.hold import Held
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.ops.linear import linear
from trl_fast.ops.matmul import add_mm, mm_into

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


def _floor(dtype: torch.dtype, terms: int) -> float:
    """Returns the share of a sum's magnitudes that always passes: its rounding, and that of so many terms."""
    return torch.finfo(dtype).eps + 4 * EPS * math.sqrt(1 + terms)


def _step(dtype: torch.dtype) -> float:
    """Returns the distance of the smallest numbers."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def try_product(draw: Draw, held: Held) -> None:
    """Tries mm_into and add_mm: factors of any layout, results in rows or columns, what is beside them untouched.

    By our own kernels, or, where both factors have one dtype, by ATen's library, which rounds to that.
    """
    rows, columns = (draw.choose(name, 0, 1, 2, 13, 29, 65, 300) for name in ("rows", "columns"))
    steps, adds = draw.choose("steps", 0, 1, 2, 33, 193, 700), draw.chance("adds", 0.5)
    dtypes = [draw.choose(name, *DTYPES[:1], *DTYPES) for name in ("left", "right", "out")]
    left = draw.laid_out("left", draw.normal(rows, steps).to(dtypes[0]))
    right = draw.laid_out("right", draw.normal(steps, columns).to(dtypes[1]))
    before = draw.normal(rows, columns).to(dtypes[2])
    out, room = _out_of(draw, before)
    own = dtypes[0] != dtypes[1] or draw.chance("own", 0.8)
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    plain = left.float() @ right.float()
    if adds:
        exact, plain, size = exact + before.double(), plain + before.float(), size + before.double().abs()
    with simulated_device(replace(device_facts(out.device), own_products=own, multiplies_bf16=False)):
        if adds:
            add_mm(out, left, right)
        else:
            mm_into(out, left, right)
    rounded = dtypes[2:] if own else [dtypes[0], dtypes[2]]
    floor, least = max(_floor(dtype, steps) for dtype in rounded), max(_step(dtype) for dtype in rounded)
    held.close("product", out, plain, exact, size, floor, least)
    if room.isnan().sum() != room.numel() - out.numel():
        held.faults.append("what is beside the result was written")


def _out_of(draw: Draw, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a result's memory, which holds `before` (R, C), and the NaN around it."""
    turned = draw.chance("turned", 0.3)
    rows, columns = reversed(before.shape) if turned else before.shape
    room = before.new_full((rows + 1, columns + draw.choose("gap", 1, 3, 40)), float("nan"))
    out = room[1:, 1 : columns + 1]
    out = out.t() if turned else out
    return out.copy_(before), room


def try_linear(draw: Draw, held: Held) -> None:
    """Tries linear and its gradients."""
    dtype = draw.choose("dtype", *DTYPES)
    shape = draw.choose("shape", (0,), (1,), (5,), (2, 3), (), (45,))
    h, v = draw.choose("h", 0, 1, 7, 40, 400), draw.choose("v", 1, 6, 33, 150)
    leaves = [
        draw.laid_out("x", draw.normal(*shape, h).to(dtype)),
        draw.laid_out("weight", draw.normal(v, h).to(dtype)),
    ]
    if draw.chance("bias", 0.5):
        leaves.append(draw.normal(v).to(dtype))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    upstream = draw.laid_out("upstream", draw.normal(*shape, v).to(dtype))
    plain = torch.nn.functional.linear(*leaves)
    exact = torch.nn.functional.linear(*(leaf.double() for leaf in leaves))
    with simulated_device(replace(device_facts(plain.device), own_products=draw.chance("own", 0.5))):
        got = linear(*leaves, *[None] * (3 - len(leaves)))
        ours = torch.autograd.grad(got, leaves, upstream)
    theirs, true = (torch.autograd.grad(x, leaves, upstream.to(x.dtype)) for x in (plain, exact))
    sizes = [leaf.detach().double().abs() for leaf in leaves]
    up = upstream.double().abs()
    held.close("result", got, plain, exact, torch.nn.functional.linear(*sizes), _floor(dtype, h), _step(dtype))
    rows = up.reshape(-1, v)
    units = [up @ sizes[1], rows.t() @ sizes[0].reshape(len(rows), h), rows.sum(0)]
    terms = v, len(rows), len(rows)
    names = ("x", "weight", "bias")[: len(leaves)]
    for name, a, b, c, unit, number in zip(names, ours, theirs, true, units, terms, strict=False):
        held.close(f"gradient of {name}", a, b, c, unit, _floor(dtype, number), _step(dtype))
