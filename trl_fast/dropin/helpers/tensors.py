"""Holds the arithmetic on small tensors that TRL's trainers share with scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F


def pad(
    tensors: Sequence[torch.Tensor],
    padding_value: int = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> torch.Tensor:
    """Stacks tensors (T_i, ...) of different sizes into one (N, T, ...), filled up with `padding_value`.

    Args:
        padding_side: the side of the first dimension that is filled, "left" or "right"; further ones at their end.
        pad_to_multiple_of: what T is rounded up to.

    Raises:
        ValueError: another padding_side.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r} is unknown; expected 'left' or 'right'")
    sizes = [max(column) for column in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if pad_to_multiple_of is not None:
        sizes[0] = -(-sizes[0] // pad_to_multiple_of) * pad_to_multiple_of
    padded = tensors[0].new_full((len(tensors), *sizes), padding_value)
    for row, tensor in zip(padded, tensors, strict=True):
        start = sizes[0] - len(tensor) if padding_side == "left" else 0
        place = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        row[place] = tensor
    return padded


def pad_to_length(tensor: torch.Tensor, length: int, pad_value: int | float, dim: int = -1) -> torch.Tensor:
    """Fills one dimension of a tensor of any shape up to `length` at its end; a longer one stays as it is."""
    missing = length - tensor.size(dim)
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, pad_value)], dim=dim)


def flush_left(mask: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Turns each row so that it starts at the first 1 of its mask, and drops the columns from the first empty one on.

    Args:
        mask: (N, T) of 0 and 1.
        tensors: (N, T) each, turned along.

    Returns:
        The mask, with tensors a tuple of it and of them.
    """
    width = mask.shape[1]
    columns = (torch.arange(width, device=mask.device) + mask.argmax(dim=1, keepdim=True)) % width
    turned = mask.gather(1, columns)
    empty = (turned.sum(dim=0) == 0).nonzero().flatten()
    kept = int(empty[0]) if len(empty) else width
    results = (turned[:, :kept], *(tensor.gather(1, columns)[:, :kept] for tensor in tensors))
    return results if tensors else results[0]


def flush_right(mask: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Does what flush_left does, to the right; mask and tensors are (N, T)."""
    flushed = flush_left(mask.flip(1), *(tensor.flip(1) for tensor in tensors))
    return tuple(result.flip(1) for result in flushed) if isinstance(flushed, tuple) else flushed.flip(1)


def nanstd(tensor: torch.Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> torch.Tensor:
    """Computes the standard deviation (divided by n - 1) of the numbers of a tensor of any shape that are not NaN.

    It is NaN where there are fewer than two.
    """
    count = (~tensor.isnan()).sum(dim=dim, keepdim=True)
    variance = (tensor - tensor.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True) / (count - 1)
    deviation = variance.where(count > 1, torch.nan).sqrt()
    if keepdim:
        return deviation
    return deviation.squeeze() if dim is None else deviation.squeeze(dim)


def nanmin(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the smallest of the numbers (N,) that are not NaN, a scalar; NaN if there is none."""
    known = tensor[~tensor.isnan()]
    return known.min() if len(known) else tensor.new_tensor(torch.nan)


def nanmax(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the largest of the numbers (N,) that are not NaN, a scalar; NaN if there is none."""
    return -nanmin(-tensor)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """Computes the entropy in nats (...) of the distributions that logits (..., V) describe, in their dtype.

    chunk_size: rows at a time; their log-probabilities are the only memory that this takes.
    """
    parts = [
        -(logprobs.exp() * logprobs).sum(-1)
        for logprobs in (F.log_softmax(rows, dim=-1) for rows in logits.flatten(0, -2).split(chunk_size))
    ]
    return torch.cat(parts).view(logits.shape[:-1])


def split_tensor_dict(tensor_dict: Mapping[str, torch.Tensor | list | None], num_chunks: int) -> list[dict[str, Any]]:
    """Cuts each tensor (N, ...) of a dict into `num_chunks` parts of N // num_chunks rows; scalars and None stay."""
    rows = len(next(value for value in tensor_dict.values() if value is not None)) // num_chunks

    def part(value: Any, index: int) -> Any:
        return value[index * rows : (index + 1) * rows] if _has_rows(value) else value

    return [{name: part(value, index) for name, value in tensor_dict.items()} for index in range(num_chunks)]


def shuffle_sequence_dict(seq_dict: Mapping[str, Sequence | torch.Tensor | None]) -> dict[str, Any]:
    """Brings the rows of all tensors (N, ...) and lists of a dict into one random order; scalars and None are kept.

    The order is that of torch's global generator.
    """
    order = torch.randperm(len(next(value for value in seq_dict.values() if value is not None)))

    def shuffled(value: Any) -> Any:
        if not _has_rows(value):
            return value
        return value[order] if isinstance(value, torch.Tensor) else [value[index] for index in order]

    return {name: shuffled(value) for name, value in seq_dict.items()}


def _has_rows(value: Any) -> bool:
    return value is not None and not (isinstance(value, torch.Tensor) and value.ndim == 0)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Computes the mean of the values of any shape where the mask of the same shape is 1, over all or one axis."""
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(axis) / mask.sum(axis)


def masked_var(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Computes the variance, a scalar, of the values of any shape where the mask of the same shape is 1.

    Raises:
        ValueError: it is unbiased, divided by n - 1, and the mask has no 1.
    """
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    if not unbiased:
        return variance
    count = mask.sum()
    if count == 0:
        raise ValueError("masked_var: the mask has no 1, so there is no value; use larger batches")
    return variance * (count / (count - 1))


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scales values of any shape to variance 1 and mean 0 (without shift_mean: their own), by those of the mask."""
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * (variance + 1e-8).rsqrt()
    return whitened if shift_mean else whitened + mean


def first_true_indices(bools: torch.Tensor, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Returns the places (...) of the first True of each row of a tensor (..., T); T where there is none."""
    places = torch.arange(bools.size(-1), device=bools.device, dtype=dtype)
    return places.where(bools, bools.size(-1)).amin(-1).to(dtype)


def truncate_response(stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> torch.Tensor:
    """Returns responses (N, T) in which all after the first stop token is padding."""
    ends = first_true_indices(responses == stop_token_id).unsqueeze(-1)
    places = torch.arange(responses.size(1), device=responses.device)
    return responses.masked_fill(places > ends, pad_token_id)


def truncate_right(
    input_ids: torch.Tensor, stop_token_ids: Sequence[int] | int, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids (N, T) in which all after the first stop token is padding, and a mask (N, T) of the others."""
    stops = torch.as_tensor(stop_token_ids, device=input_ids.device)
    ends = first_true_indices(torch.isin(input_ids, stops)).unsqueeze(-1)
    beyond = torch.arange(input_ids.size(1), device=input_ids.device) > ends
    return input_ids.masked_fill(beyond, pad_token_id), torch.ones_like(input_ids).masked_fill(beyond, 0)


def exact_div(a: int, b: int, custom_error_message: str = "") -> int:
    """Returns a / b.

    Raises:
        ValueError: b does not divide a.
    """
    if a % b:
        raise ValueError(f"{custom_error_message}, inexact division: {a} / {b} = {a / b}")
    return a // b


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Returns a dict without dicts in it, its keys the paths to the values.

    Raises:
        ValueError: a key has the separator in it.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"separator {sep!r} not allowed to be in key {key!r}")
        inner = flatten_dict(value, sep) if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}{sep}{name}": leaf for name, leaf in inner.items()}
    return flat
