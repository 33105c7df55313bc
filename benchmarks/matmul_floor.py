"""Times the floor of the loss head: the bare matrix products, each in this machine's fastest layout.

A product covers all N x V logits block by block. It may be whole blocks of rows or tiles of the vocabulary, and the
weight's gradient may come out as [V, H] or, from contiguous transposed hidden states, as [H, V]. Which is fastest
differs between machines and sizes by more than the floor is used to tell apart, so each is tried once, on all columns
and as many rows as its block has, by every library: the one that ATen chooses, oneDNN, which it has beside that for
CPUs, and our kernels where they serve.

The floor is generous. Operands are in the product's dtype before it starts, and all memory is there, in huge pages as
ours. Every block of logits is the same buffer: a tile stays in the cache, and what it costs to keep logits until
backward is not the floor's. Each product has its own layout, though an op has to hand logits from one to the next.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from trl_fast.ops.device import device_facts
from trl_fast.ops.head.plan import slices, workspace_of
from trl_fast.ops.matmul import add_mm, mm_into, own_product_serves
from trl_fast.ops.memory_pool import pooled_empty

from .timing import first_seconds

PRODUCTS = {
    "scoring": ("logits",),
    "frozen": ("logits", "grad_hidden"),
    "trained": ("logits", "grad_hidden", "grad_weight"),
}
TILE_ROWS = 2048
TILE_COLUMNS = (2048, 8192)
# Any ordinary number: what is in the operands does not change a product's speed, short of denormals.
FILL = 0.01


def _multiply_by_aten(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, adds: bool) -> None:
    out.addmm_(left, right, beta=adds)


def _multiply_by_onednn(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, adds: bool) -> None:
    """Computes the product alone: the op writes and adds to no memory that is given."""
    torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def _multiply_by_kernels(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, adds: bool) -> None:
    (add_mm if adds else mm_into)(out, left, right)


LIBRARIES = {"ATen": _multiply_by_aten, "oneDNN": _multiply_by_onednn, "ours": _multiply_by_kernels}


class Layout(NamedTuple):
    """Holds rows and columns of a block of logits; transposed: the weight's gradient is written as [H, V]."""

    rows: int
    columns: int
    transposed: bool = False
    library: str = "ATen"

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}{', [H, V]' if self.transposed else ''}, {self.library}"


class Floor:
    """Holds the bare products of hidden (N, H) and weight (V, H), computed in `dtype`.

    tried: seconds of every layout of the products that were asked for, scaled to N rows.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.hidden = hidden.detach().to(dtype)
        self.weight = self._filled(*weight.shape).copy_(weight.detach())
        self.tried: dict[str, dict[Layout, float]] = {}

    def _filled(self, *shape: int) -> torch.Tensor:
        return pooled_empty(shape, self.hidden.dtype, self.hidden.device).fill_(FILL)

    @functools.cached_property
    def grad_hidden(self) -> torch.Tensor:
        return self._filled(*self.hidden.shape)

    @functools.cached_property
    def grad_weight(self) -> torch.Tensor:
        return self._filled(*self.weight.shape)

    @functools.cached_property
    def hidden_t(self) -> torch.Tensor:
        return self.hidden.t().contiguous()

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        """Returns memory for a block of logits of any layout."""
        return self._filled(max(layout.rows * layout.columns for layout in self.candidates("logits")))

    def candidates(self, product: str) -> list[Layout]:
        """Returns the layouts to try, without repetition: whole blocks of rows, and tiles of the vocabulary."""
        num_rows, vocab = self.hidden.shape[0], self.weight.shape[0]
        workspace = workspace_of(None, self.hidden.device, device_facts(self.hidden.device))
        block = min(num_rows, workspace // (vocab * self.hidden.dtype.itemsize))
        blocks = [(block, vocab), *((min(num_rows, TILE_ROWS), min(vocab, columns)) for columns in TILE_COLUMNS)]
        ways = (False, True) if product == "grad_weight" else (False,)
        every = itertools.product(blocks, ways, self.libraries)
        return list(dict.fromkeys(Layout(*block, transposed, library) for block, transposed, library in every))

    @property
    def libraries(self) -> list[str]:
        """Returns the names of what multiplies matrices of this dtype on this device."""
        hidden, is_cpu = self.hidden, self.hidden.device.type == "cpu"
        return [
            "ATen",
            *(["oneDNN"] if is_cpu and hidden.dtype == torch.float32 else []),
            *(["ours"] if own_product_serves(hidden, hidden, hidden) else []),
        ]

    def multiply(self, product: str, layout: Layout, num_rows: int) -> None:
        """Computes the product for the first rows, block by block, into memory that is there."""
        hidden, weight, run = self.hidden, self.weight, LIBRARIES[layout.library]
        grad_weight_t = self.grad_weight.view(hidden.shape[1], -1) if layout.transposed else None
        for columns in slices(0, weight.shape[0], layout.columns):
            for rows in slices(0, num_rows, layout.rows):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                logits = self.logits[: math.prod(shape)].view(shape)
                if product == "logits":
                    run(logits, hidden[rows], weight[columns].t(), False)
                elif product == "grad_hidden":
                    run(self.grad_hidden[rows], logits, weight[columns], columns.start > 0)
                elif grad_weight_t is not None:
                    run(grad_weight_t[:, columns], self.hidden_t[:, rows], logits, rows.start > 0)
                else:
                    run(self.grad_weight[columns], logits.t(), hidden[rows], rows.start > 0)

    def best(self, product: str) -> Layout:
        """Returns the fastest layout of a product; tries all of them when it is first asked."""
        if product not in self.tried:
            self.tried[product] = {layout: self._try(product, layout) for layout in self.candidates(product)}
        return min(self.tried[product], key=self.tried[product].get)

    def _try(self, product: str, layout: Layout) -> float:
        run = functools.partial(self.multiply, product, layout, layout.rows)
        return first_seconds(run, self.hidden.device) * len(self.hidden) / layout.rows

    def step(self, mode: str) -> Callable[[], None]:
        """Computes the products that a mode of the head cannot do without, one after the other."""
        chosen = {product: self.best(product) for product in PRODUCTS[mode]}

        def run() -> None:
            for product, layout in chosen.items():
                self.multiply(product, layout, len(self.hidden))

        return run
