"""Measures what the card can do: copies, and the head's three products in every form that a sweep could use.

The best form of each product is the floor of the head at that size. Operands are random: constant ones draw less power
and run faster than real data will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..head_size import Size
from .phase_context import Kit

SIZES = (Size(8192, 4096, 151936), Size(8192, 2048, 151936), Size(16384, 896, 151936), Size(8192, 4096, 131072))
TINY_SIZES = (Size(48, 32, 640),)
ROUNDS = 5


def sizes(kit: Kit) -> tuple[Size, ...]:
    return TINY_SIZES if kit.tiny else SIZES


def random_matrix(rows: int, columns: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """Returns (rows, columns) bfloat16, normal with the given standard deviation, made on the device."""
    return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, scale)


def run(kit: Kit) -> None:
    _copy(kit)
    _square(kit)
    for size in sizes(kit)[:3]:
        if kit.late(f"products at {size}", 5):
            return
        for what, flops, call in products(size, kit):
            try:
                ms = kit.clock.median(call, ROUNDS)
                kit.facts.add(f"product {what}", size=str(size), ms=ms, tflops=flops / ms / 1e9)
            except Exception as error:
                kit.facts.skip(f"product {what}", error, size=str(size))
        kit.clock.release()


def _copy(kit: Kit) -> None:
    count = 1 << 31 if kit.is_gpu else 1 << 16
    source = torch.empty(count, dtype=torch.int8, device=kit.device).random_()
    target = torch.empty_like(source)
    ms = kit.clock.median(lambda: target.copy_(source))
    kit.facts.add("copy", ms=ms, bytes=2 * count, gb_per_s=2 * count / ms / 1e6)


def _square(kit: Kit) -> None:
    side = 8192 if kit.is_gpu else 64
    left, right = (random_matrix(side, side, kit.device) for _ in range(2))
    out = torch.empty_like(left)
    ms = kit.clock.median(lambda: torch.mm(left, right, out=out))
    kit.facts.add("square product bf16", size=str(side), ms=ms, tflops=2 * side**3 / ms / 1e9)


def products(size: Size, kit: Kit) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Yields (name, operations, call) of every form: all rows, halves and quarters of them, tiles of the columns."""
    n, h, v = size
    x, w = random_matrix(n, h, kit.device), random_matrix(v, h, kit.device, h**-0.5)
    grad = random_matrix(n, v, kit.device, 1e-3)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        out = torch.empty(n, v, dtype=dtype, device=kit.device)
        yield f"logits {name}", size.pass_flops, lambda out=out: _mm(x, w.t(), out)
        for parts in (2, 4, 8):
            yield f"logits {name}, {parts} row blocks", size.pass_flops, _logits_by_rows(x, w, out, parts)
        tile = out.view(-1)[: n * min(v, 32768)].view(n, -1)
        yield f"logits {name}, column tiles", size.pass_flops, _logits_by_columns(x, w, tile)
        del out, tile
        hidden, weight = (torch.empty(shape, dtype=dtype, device=kit.device) for shape in (x.shape, w.shape))
        yield f"grad_hidden {name}", size.pass_flops, lambda out=hidden: _mm(grad, w, out)
        yield f"grad_weight {name}", size.pass_flops, lambda out=weight: _mm(grad.t(), x, out)
        tile = weight[: min(v, 32768)]
        yield f"grad_weight {name}, column tiles", size.pass_flops, _weight_by_columns(x, grad, weight, len(tile))
    total_hidden, total_weight = (torch.zeros(m.shape, dtype=torch.float32, device=kit.device) for m in (x, w))
    inside = [("inside", _add_inside), ("outside", _add_outside)]
    for name, add in inside:
        yield f"grad_weight added {name}", size.pass_flops, lambda add=add: add(total_weight, grad.t(), x)
        yield (
            f"grad_weight added {name}, 4 row blocks",
            size.pass_flops,
            lambda add=add: [add(total_weight, g.t(), r) for g, r in zip(grad.chunk(4), x.chunk(4), strict=True)],
        )
        yield (
            f"grad_hidden added {name}, column tiles",
            size.pass_flops,
            lambda add=add: [
                add(total_hidden, g, r) for g, r in zip(grad.split(32768, 1), w.split(32768), strict=True)
            ],
        )


def _mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if out.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(left, right))


def _add_inside(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if total.is_cuda:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.addmm_(left.float(), right.float())


def _add_outside(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    return total.add_(_mm(left, right, product))


def _logits_by_rows(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, parts: int) -> Callable[[], object]:
    return lambda: [_mm(r, w.t(), o) for r, o in zip(x.chunk(parts), out.chunk(parts), strict=True)]


def _logits_by_columns(x: torch.Tensor, w: torch.Tensor, tile: torch.Tensor) -> Callable[[], object]:
    """Computes every tile of columns into the same memory, one after the other."""
    width = tile.shape[1]
    return lambda: [_mm(x, part.t(), tile.view(-1)[: len(x) * len(part)].view(len(x), -1)) for part in w.split(width)]


def _weight_by_columns(x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, width: int) -> Callable[[], object]:
    return lambda: [_mm(g.t(), x, o) for g, o in zip(grad.split(width, dim=1), out.split(width), strict=True)]
