"""Sweeps both heads over row blocks: products, the row kernel, and the student's gradients while the block is there.

A block's logits of student and teacher are all that grows with rows times vocabulary; the gradient of the logits takes
the place of the student's. Four passes over N·V·H where the head trains, three where it is frozen, one less where the
teacher's log-probabilities are given.
"""

from __future__ import annotations

import torch

from ..device import device_facts
from ..head.gradients import Needs
from ..head.plan import GPU_TILES, even_step, slices
from ..matmul import add_mm, mm_into
from ..memory_pool import as_dtype, pooled_empty
from .heads import DivergenceHead
from .row_kernels import NUM_RESULTS
from .teachers import Teacher

# Rows of a block on a CPU, at most: larger products are no faster.
_CPU_ROWS = 512


def block_rows(num_rows: int, row_bytes: int, workspace_bytes: int, device: torch.device) -> int:
    """Returns the rows of a block of which a row takes so many bytes of the workspace.

    Raises:
        ValueError: the workspace holds no row of both heads' logits.
    """
    fitting = workspace_bytes // row_bytes
    if not fitting:
        raise ValueError(
            f"workspace_bytes: {workspace_bytes} bytes hold no row of both heads' logits; a row takes {row_bytes}"
        )
    if device_facts(device).kind == "cpu":
        fitting = min(fitting, _CPU_ROWS)
    step = GPU_TILES.row_step
    rows = even_step(max(num_rows, 1), fitting)
    # A GPU's products are made of so many rows.
    return min(fitting // step * step, -(-rows // step) * step) if fitting >= step and rows < num_rows else rows


class StudentGradients:
    """Sums the gradients of the student's hidden states, weight and bias over row blocks, each only if needed.

    num_rows: of all blocks; total_columns: rows of the whole weight, of which those from V on have no gradient;
    dtypes: of the three results.
    """

    def __init__(
        self,
        head: DivergenceHead,
        needs: Needs,
        num_rows: int,
        total_columns: int,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        *,
        one_block: bool,
    ) -> None:
        self._head, self._dtypes, self._one_block = head, dtypes, one_block
        self._hidden_columns = head.weight.shape[1]
        self._sums = torch.promote_types(head.product, torch.float32)
        device = head.weight.device
        self._hidden = self._weight = self._bias = None
        if needs.hidden:
            self._hidden = torch.zeros(num_rows, self._hidden_columns, dtype=self._sums, device=device)
        if needs.weight:
            # One product sums in float32 and is rounded once.
            narrow = one_block and dtypes[1] == head.product
            dtype = dtypes[1] if narrow else self._sums
            self._weight = pooled_empty((total_columns, self._hidden_columns), dtype, device)
            self._weight[0 if not num_rows else head.vocab_size :].zero_()
        if needs.bias:
            self._bias = torch.zeros(total_columns, dtype=self._sums, device=device)
        self._is_first = True

    def add(self, rows: slice, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds a block: gradient (R, V) of the raw products in the product's dtype; hidden: (R, H)."""
        if self._hidden is not None:
            for columns, tile in self._head.tiles():
                (add_mm if columns.start else mm_into)(self._hidden[rows], gradient[:, columns], tile)
        if self._weight is not None:
            total = self._weight[: self._head.vocab_size]
            (mm_into if self._is_first else add_mm)(total, gradient.t(), hidden.to(self._head.product))
        if self._bias is not None:
            self._bias[: self._head.vocab_size] += gradient.sum(dim=0, dtype=self._sums)
        self._is_first = False

    def results(self, factor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the sums over `factor`, a scalar or None for 1, in the results' dtypes; empty where not needed."""
        hidden, weight, bias = (
            torch.empty(0, dtype=dtype, device=self._head.weight.device)
            if total is None
            else as_dtype(total if factor is None else total.div_(factor), dtype)
            for total, dtype in zip((self._hidden, self._weight, self._bias), self._dtypes, strict=True)
        )
        return hidden, weight, bias


def sweep_divergence(
    student: DivergenceHead,
    hidden: torch.Tensor,
    teacher: Teacher,
    weights: torch.Tensor | None,
    needs: Needs,
    total_columns: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    workspace_bytes: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Computes the results (3, N) of all rows, and the gradients of their weighted sum where they are needed.

    Args:
        hidden: (N, H); weights: (N,), None for 1. On a CPU, rows of weight 0 are left out; their results are 0.
        needs, total_columns, dtypes: of StudentGradients.
    """
    device, num_rows = hidden.device, hidden.shape[0]
    sums = torch.promote_types(student.product, torch.float32)
    weights = torch.ones(num_rows, dtype=sums, device=device) if weights is None else weights.to(sums)
    index = _counting_rows(weights)
    kept_hidden, kept_weights = (hidden, weights) if index is None else (hidden[index], weights[index])
    teacher = teacher.of_rows(index)
    row_bytes = max(1, student.vocab_size * teacher.bytes_per_column(student))
    height = block_rows(len(kept_hidden), row_bytes, workspace_bytes, device)
    blocks = slices(0, len(kept_hidden), height)
    factor = loss_scale(student, kept_weights) if any(needs) else None
    given = (student, needs, len(kept_hidden), total_columns, dtypes)
    gradients = StudentGradients(*given, one_block=len(blocks) == 1)
    results = torch.full((NUM_RESULTS, len(kept_hidden)), float("nan"), dtype=sums, device=device)
    logits = pooled_empty((min(height, len(kept_hidden)), student.vocab_size), student.logits, device)
    for rows in blocks:
        products = student.multiply(kept_hidden[rows], logits[: rows.stop - rows.start])
        scaled = kept_weights[rows] if factor is None else kept_weights[rows] * factor
        gradient = teacher.compare(rows, student, products, scaled, results[:, rows], any(needs))
        if gradient is not None:
            gradients.add(rows, gradient, kept_hidden[rows])
    found = gradients.results(factor)
    if index is None:
        return torch.where(weights == 0, 0.0, results), found
    everywhere = results.new_zeros(NUM_RESULTS, num_rows).index_copy_(1, index, results)
    if needs.hidden:
        spread = found[0].new_zeros(hidden.shape).index_copy_(0, index, found[0])
        found = (spread, *found[1:])
    return everywhere, found


def _counting_rows(weights: torch.Tensor) -> torch.Tensor | None:
    """Returns the rows (A,) int64 whose weights (N,) are not 0; None for all. A GPU's host would have to wait."""
    if weights.device.type != "cpu" or bool(weights.ne(0).all()):
        return None
    return weights.nonzero().squeeze(1)


def loss_scale(student: DivergenceHead, weights: torch.Tensor) -> torch.Tensor | None:
    """Returns what gradients of logits are multiplied with, so that float16 has them, 0-d; None for other dtypes.

    weights: (N,). float16 ends at 6e-8, below which probabilities times a mean's weight lie.
    """
    if student.product != torch.float16 or not len(weights):
        return None
    steepest = abs(student.transform.scale) * student.transform.inv_temperature
    # On the device: a GPU's host does not wait for it.
    largest = steepest * weights.abs().amax()
    power = (10 - torch.frexp(largest).exponent).clamp(max=100)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), power), 1.0)
