"""Merges attention over two sets of keys in Triton; `trl_fast/ops/attention_merge.py` specifies the kernel.

One program takes some tokens of one head: it reads both outputs once and writes the merged one. The log-sum-exps are
those of the heads' tokens, (heads, T), so that a program's lie together.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device

# Elements of a program: sixteen a thread, two 16-byte accesses of a 16-bit type.
BLOCK_ELEMENTS, NUM_WARPS = 2048, 4

# Numbers of tokens, and where vectors of them begin, are nobody's business.
_ANY_VALUE = ["lse", "lse_head", "other_lse", "other_lse_head", "place", "merged_lse", "num_tokens"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def merge_kernel(
    out,
    out_token,
    out_head,
    lse,
    lse_head,
    other,
    other_token,
    other_head,
    other_lse,
    other_lse_head,
    place,
    merged,
    merged_lse,
    num_tokens,
    num_heads,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges TOKENS tokens of one head; BLOCK is the power of two that WIDTH channels fit in."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tokens = (tl.program_id(0) // num_heads) * TOKENS + tl.arange(0, TOKENS)
    there = tokens < num_tokens
    second = tl.load(place + tokens, mask=there, other=-1).to(tl.int64)
    has_second = second >= 0
    a = tl.load(lse + head * lse_head + tokens, mask=there, other=0.0)
    b = tl.load(other_lse + head * other_lse_head + second, mask=has_second, other=-float("inf"))
    top = tl.maximum(a, b)
    # Where neither has a key, subtract 0: -inf - -inf would be NaN.
    anchor = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2((b - anchor) * LOG2E)
    sum_of_both = tl.exp2((a - anchor) * LOG2E) + weight
    share = tl.where(sum_of_both == 0.0, 0.0, weight / sum_of_both)
    total = tl.where(has_second, anchor + tl.log(sum_of_both), a)
    tl.store(merged_lse + head * num_tokens + tokens, total, mask=there)

    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < WIDTH
    rows = tokens.to(tl.int64)[:, None]
    mask = there[:, None] & inside
    x = tl.load(out + rows * out_token + head * out_head + columns, mask=mask, other=0.0).to(tl.float32)
    from_other = other + second[:, None] * other_token + head * other_head + columns
    y = tl.load(from_other, mask=has_second[:, None] & inside, other=0.0).to(tl.float32)
    share = share[:, None]
    # What has no share is not looked at: it may be anything.
    z = tl.where(share == 0.0, x, tl.where(share == 1.0, y, x * (1.0 - share) + y * share))
    to = merged + (rows * num_heads + head) * WIDTH + columns
    tl.store(to, z.to(merged.dtype.element_ty), mask=mask)


@on_tensors_device
def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    place: torch.Tensor,
    merged: torch.Tensor,
    merged_lse: torch.Tensor,
) -> None:
    """Fills merged (T, heads, D) and merged_lse (heads, T), both contiguous; the rest as in attention_merge.py."""
    num_tokens, num_heads, width = out.shape
    if out.numel() == 0:
        return
    block = triton.next_power_of_2(width)
    tokens = max(BLOCK_ELEMENTS // block, 1)
    merge_kernel[(triton.cdiv(num_tokens, tokens) * num_heads,)](
        out,
        out.stride(0),
        out.stride(1),
        lse,
        lse.stride(0),
        other,
        other.stride(0),
        other.stride(1),
        other_lse,
        other_lse.stride(0),
        place,
        merged,
        merged_lse,
        num_tokens,
        num_heads,
        WIDTH=width,
        TOKENS=tokens,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
