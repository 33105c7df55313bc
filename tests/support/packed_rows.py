"""Holds the packed row kernels of every backend to one specification."""

from __future__ import annotations

import torch

from trl_fast.ops.head.kept_logits import CHUNK, num_chunks, unpack
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.row_kernels import (
    RowKernels,
    row_grad_packed_reference,
    row_grad_reference,
    row_scores_packed_reference,
)
from trl_fast.ops.head.row_statistics import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, LSE_ROW, MEAN_LOGITS
from trl_fast.ops.head.sweep import finish_scores, new_state

EVERYTHING = ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS | IS_TOP1
# Scale, inverse temperature, whether there is a bias.
PLAIN, TRANSFORMED = (1.0, 1.0, False), (0.5, 1.25, True)
# Around a vector, a thread's share, a chunk and two of them.
COLUMNS = (1, 5, 8, 2047, 2048, 2049, 4104, 6007)
NUM_ROWS, FIRST_COLUMN = 9, 11


def assert_as_good_as(baseline: torch.Tensor, got: torch.Tensor, exact: torch.Tensor, floor: float) -> None:
    """The same NaN and infinities as float64, and at most twice the error of PyTorch in the same dtype, row by row."""
    got, baseline = got.double(), baseline.double()
    special = ~exact.isfinite()
    torch.testing.assert_close(got[special], exact[special], equal_nan=True)
    assert got[~special].isfinite().all()
    scale = exact.abs().where(~special, 0).amax(dim=1).clamp(min=1)

    def error(result):
        return (result - exact).abs().where(~special, 0).amax(dim=1)

    assert (error(got) <= 2 * error(baseline) + floor * scale).all(), (error(got), error(baseline), scale)


def hard_rows(columns: int, misplaced: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (9, columns) that break packing, with a row stride that is no multiple of 16 bytes; targets (9,)."""
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(NUM_ROWS, columns + 3, generator=generator)[:, misplaced : misplaced + columns]
    logits[1] += 1e4
    logits[2, 1::2] = float("-inf")
    logits[3] = float("-inf")
    logits[4, ::3] -= 1000
    logits[5] = 1.5
    logits[6, columns // 2] = float("nan")
    logits[7, columns // 3] = float("inf")
    logits[8, : columns // 2 // CHUNK * CHUNK] = float("-inf")  # whole chunks of it, before others
    targets = torch.randint(0, columns, (NUM_ROWS,), generator=generator)
    targets[0] = columns - 1
    targets[2] = columns + 7
    targets[4] = -1 - FIRST_COLUMN
    return logits, targets + FIRST_COLUMN


class Packed:
    """Room for packed rows, filled with what must not stay, and a margin around it that must stay."""

    def __init__(self, columns: int, misplaced: int = 0) -> None:
        self.storage = torch.full((NUM_ROWS, columns + 16), 12345, dtype=torch.int16)
        self.words = self.storage[:, misplaced : misplaced + columns]
        self.tops = torch.full((NUM_ROWS, num_chunks(columns) + 1), float("nan"))
        self.margin = torch.ones_like(self.storage, dtype=torch.bool)
        self.margin[:, misplaced : misplaced + columns] = False

    def codes(self) -> torch.Tensor:
        return self.words.int() & 0xFFFF

    def check_margin(self) -> None:
        assert (self.storage[self.margin] == 12345).all() and self.tops[:, -1].isnan().all()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal numbers, NaN where the other has it."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def pack_hard_rows(
    kernels: RowKernels, columns: int, transform: tuple, misplaced: int = 0, outputs: int = EVERYTHING
) -> tuple[torch.Tensor, torch.Tensor, Packed]:
    """Packs them and checks every word against float64 and the reference; their state and targets."""
    scale, inv_temperature, with_bias = transform
    logits, targets = hard_rows(columns, misplaced % 4)
    bias = torch.randn(columns, generator=torch.Generator().manual_seed(1)) if with_bias else None
    given, terms = (logits, targets, bias), (scale, inv_temperature, outputs, FIRST_COLUMN)
    packed, reference = Packed(columns, misplaced), Packed(columns)
    state, unpacked, expected = (new_state(NUM_ROWS, logits.device) for _ in range(3))
    kernels.scores_packed(*given, *terms, state, packed.words, packed.tops)
    kernels.scores(*given, scale, 0.0, inv_temperature, outputs, FIRST_COLUMN, unpacked)
    assert same_bits(state, unpacked)
    row_scores_packed_reference(*given, *terms, expected, reference.words, reference.tops)
    packed.check_margin()

    away = (packed.codes() - reference.codes()).abs()
    assert torch.equal(packed.codes() == 65535, reference.codes() == 65535)
    assert away.max() <= (0 if transform == PLAIN else 1)
    torch.testing.assert_close(packed.tops, reference.tops, rtol=1e-6, atol=1e-6, equal_nan=True)
    exact_bias = None if bias is None else bias.double()
    u, _ = LogitTransform(scale, 0.0, inv_temperature).apply(logits.double(), exact_bias)
    u = u.masked_fill(torch.arange(columns) == (targets - FIRST_COLUMN)[:, None], float("-inf"))
    finite = [row for row in range(NUM_ROWS) if row not in (6, 7)]
    found = unpack(packed.words, packed.tops)[finite]
    for part, kept in zip(u[finite].split(CHUNK, dim=1), found.split(CHUNK, dim=1), strict=True):
        top = part.amax(dim=1, keepdim=True)
        wanted = torch.where(part == float("-inf"), part, torch.maximum(part, top - 65534 * 2.0**-10))
        away = torch.where(wanted == kept, 0.0, (wanted - kept).abs())
        assert (away <= 2.0**-11 + 2e-7 * top.abs() + 1e-5).all()
    return state, targets, packed


def check_packing(
    kernels: RowKernels,
    columns: int,
    transform: tuple,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    misplaced: int = 0,
) -> None:
    """Scores as without packing, to the bit; every word; and the gradient, of all rows and of some."""
    scale, inv_temperature, _ = transform
    state, targets, packed = pack_hard_rows(kernels, columns, transform, misplaced)
    lse = finish_scores(state, 0, columns, torch.float32)[LSE_ROW].clone()
    coefficients = torch.randn(4, NUM_ROWS, generator=torch.Generator().manual_seed(1))
    coefficients[1, ::2] = 0
    u = unpack(packed.words, packed.tops).double()
    exact = torch.empty_like(u)
    identity = (targets, None, 1.0, 0.0, 1.0)
    row_grad_reference(u, *identity, lse.double(), coefficients.double(), FIRST_COLUMN, exact)
    exact *= scale * inv_temperature
    for dtype in dtypes:
        baseline = torch.full((NUM_ROWS, columns), float("nan"), dtype=dtype)
        given = (targets, scale, inv_temperature, lse, coefficients, FIRST_COLUMN)
        row_grad_packed_reference(packed.words, None, *given, baseline, packed.tops)
        for index in (None, torch.tensor([4, 0, 2, 8, 6])):
            rows = slice(None) if index is None else index
            room = torch.full((len(targets[rows]), columns + 3), float("nan"), dtype=dtype)
            out = room[:, 1 : columns + 1]  # some rows begin at a multiple of sixteen bytes
            terms = (targets[rows], scale, inv_temperature, lse[rows], coefficients[:, rows].contiguous())
            kernels.grad_packed(packed.words, index, *terms, FIRST_COLUMN, out, packed.tops)
            assert_as_good_as(baseline[rows], out, exact[rows], floor=1e-6)
            assert room[:, [0, -2, -1]].isnan().all()
            if index is None and dtype.itemsize == 2:
                words = packed.storage.clone().as_strided(
                    packed.words.shape, packed.words.stride(), packed.words.storage_offset()
                )
                kernels.grad_packed(words, None, *given, words.view(dtype), packed.tops)
                assert same_bits(words.view(dtype), out)


def check_empty(kernels: RowKernels) -> None:
    """Without rows or columns nothing is read or written."""
    for rows, columns in ((0, 40), (3, 0)):
        logits, targets = torch.empty(rows, columns), torch.zeros(rows, dtype=torch.int64)
        words, tops = torch.empty(rows, columns, dtype=torch.int16), torch.empty(rows, num_chunks(columns))
        state = new_state(rows, logits.device)
        kernels.scores_packed(logits, targets, None, 1.0, 1.0, EVERYTHING, 0, state, words, tops)
        assert same_bits(state, new_state(rows, logits.device))
        kernels.grad_packed(words, None, targets, 1.0, 1.0, torch.zeros(rows), torch.ones(4, rows), 0, logits, tops)
