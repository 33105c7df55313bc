"""Merges attention over two sets of keys into one softmax, by their log-sum-exps.

With outputs o₁, o₂ and log-sum-exps l₁, l₂ of the scores, the softmax over both sets has the log-sum-exp
l = log(e^l₁ + e^l₂) and the output (1 - s) o₁ + s o₂, s = e^(l₂ - l) (FlashAttention, arXiv 2205.14135, section 3.1).
A set without keys has l = -∞ and no share; its output, whatever that is, is not looked at.
"""

from __future__ import annotations

import torch

from .backends import choose_backend
from .device import device_facts


def _share_and_sum(lse: torch.Tensor, other_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the other's share of the softmax, 0 if neither has a key, and both's log-sum-exp; of any one shape."""
    total = torch.logaddexp(lse, other_lse)
    return torch.sigmoid(other_lse - lse).masked_fill_(total == float("-inf"), 0.0), total


def merge_into(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Merges other (..., D), other_lse (...) into out (..., D), lse (...); both must have keys."""
    share, total = _share_and_sum(lse, other_lse)
    lse.copy_(total)
    merged = out.to(total.dtype)
    # One pass, where a sum of two products would be three.
    torch.lerp(merged, other.to(total.dtype), share[..., None], out=merged)
    if merged is not out:
        out.copy_(merged)


def _merge_reference(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if other.shape[0] == 0:
        return out.clone(memory_format=torch.contiguous_format), lse.clone(memory_format=torch.contiguous_format)
    index = place.clamp(min=0).long()
    share, total = _share_and_sum(lse, other_lse[:, index].masked_fill(place < 0, float("-inf")))
    share, first, second = share.t()[..., None], out.to(share.dtype), other[index].to(share.dtype)
    merged = torch.where(share == 1, second, torch.lerp(first, second, share))
    return torch.where(share == 0, first, merged).to(out.dtype).contiguous(), total


def _merge_in_triton(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from trl_fast.kernels.attention_merge import merge

    merged, merged_lse = out.new_empty(out.shape), lse.new_empty(lse.shape)
    merge(out, lse, other, other_lse, place, merged, merged_lse)
    return merged, merged_lse


def _merge_in_cuda(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.trl_fast.merge_attention(out, lse, other, other_lse, place)


_MERGE = {"cuda": _merge_in_cuda, "triton": _merge_in_triton, "torch": _merge_reference}


@torch.library.custom_op("trl_fast::attention_merge", mutates_args=())
def _attention_merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    place: torch.Tensor,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = choose_backend("attention_merge", backend, device_facts(out.device), out.dtype)
    return _MERGE[chosen](out, lse, other, other_lse, place)


@_attention_merge.register_fake
def _(out: torch.Tensor, lse: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _check_inputs(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, place: torch.Tensor
) -> None:
    num_tokens, num_heads, width = out.shape
    shapes = {
        "lse": (lse, (num_heads, num_tokens), torch.float32),
        "other": (other, (other.shape[0], num_heads, width), out.dtype),
        "other_lse": (other_lse, (num_heads, other.shape[0]), torch.float32),
        "place": (place, (num_tokens,), torch.int32),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != out.device:
            raise ValueError(
                f"{name}: expected {dtype} of shape {shape} on {out.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    for name, tensor in (("out", out), ("lse", lse), ("other", other), ("other_lse", other_lse), ("place", place)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")


def merge_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    place: torch.Tensor,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention over two sets of keys, of which the second is there for some tokens only.

    Nothing is changed in place: gradient checkpointing keeps what a flash kernel gave. On a GPU one kernel, in CUDA or
    Triton, reads both outputs once and writes the merged one, tokens without a second set included.

    Args:
        out: (T, heads, D), any float dtype; lse: (heads, T) float32, -∞ where a token has no key.
        other: (M, heads, D), dtype of out; other_lse: (heads, M) float32.
        place: (T,) int32, the row of `other` that belongs to each token; -1: none, and its output stays as it is. Its
            range is not checked. All may be strided, but for their last dimension.
        backend: "cuda", "triton", "torch" or None for the first that can serve; see `trl_fast.ops.backends`.

    Returns:
        The merged output (T, heads, D) and log-sum-exp (heads, T), new and contiguous; without a gradient formula.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    _check_inputs(out, lse, other, other_lse, place)
    return _attention_merge(out, lse, other, other_lse, place, backend)
