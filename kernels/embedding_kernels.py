"""Sums the gradients of equal tokens in Triton: `trl_fast/ops/layers/embedding.py` specifies the kernel.

A program takes some columns of one place among the sorted tokens. The first place of each token sums all of them, in
the order in which they come, and writes or changes the token's row once: no atomics, the same bits in every run, and
the host waits for no number of tokens. Offsets are 64-bit.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device

# Rows that are added at once, so that a token that is everywhere is no chain of single loads, and their columns.
ROWS, BLOCK, NUM_WARPS = 8, 512, 4


@triton.jit(do_not_specialize=["order", "tokens", "num_places"])
def embedding_sums_kernel(
    grad,
    order,
    tokens,
    out,
    num_places,
    num_columns,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums BLOCK columns of a token's rows, from its first place on; to what is there already if it ADDS."""
    blocks = tl.cdiv(num_columns, BLOCK)
    place = tl.program_id(0) // blocks
    token = tl.load(tokens + place)
    before = tl.load(tokens + place - 1, mask=place > 0, other=-1)
    if token != before:
        columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_columns
        to = out + token * num_columns + columns
        total = tl.zeros([BLOCK], tl.float32)
        if ADDS:
            total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        count = ROWS
        while count == ROWS:
            places = place + tl.arange(0, ROWS)
            alike = tl.load(tokens + places, mask=places < num_places, other=-1) == token
            rows = tl.load(order + places, mask=alike, other=0)
            x = tl.load(
                grad + rows[:, None] * num_columns + columns[None, :], mask=alike[:, None] & inside[None, :], other=0.0
            )
            total += tl.sum(x.to(tl.float32), 0)
            count = tl.sum(alike.to(tl.int32), 0)
            place += ROWS
        tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@on_tensors_device
def embedding_sums(
    grad: torch.Tensor, order: torch.Tensor, tokens: torch.Tensor, adds: bool, out: torch.Tensor
) -> None:
    """Writes the sums of grad (N, H) to the rows of tokens in out (V, H), or adds them; both contiguous, of one dtype.

    tokens: (N,) int64, sorted, from 0 on; order: (N,) int64, the row of grad that each one has.
    """
    if grad.numel() == 0:
        return
    num_places, num_columns = grad.shape
    embedding_sums_kernel[(num_places * triton.cdiv(num_columns, BLOCK),)](
        grad, order, tokens, out, num_places, num_columns, ADDS=adds, ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
