"""Gives results of operators whose result depends on data, which fake tensors do not have.

What is computed from whole numbers of the batch alone is known (`roofline.known_values`). The answers to all else are
those of a step in which every row counts and nothing is wrong with the input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from .roofline.known_values import as_fake, known_result, without_masks

aten = torch.ops.aten
# How many entries a row of the sparse gradient keeps: measured on real text at the default threshold, SmolLM2-135M.
SPARSE_ENTRIES = 725


def _scalar(tensor: torch.Tensor) -> bool | int:
    """Returns a number that the host reads: yes, or 1."""
    return True if tensor.dtype == torch.bool else 1


def _none_found(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the places of what is wrong: there are none."""
    return tensor.new_empty((0, tensor.dim()), dtype=torch.int64)


def _entries_of_rows(rows: torch.Tensor, counts: torch.Tensor, **_: object) -> torch.Tensor:
    """Returns the row of each kept entry of the sparse gradient."""
    return rows.new_empty(len(rows) * SPARSE_ENTRIES)


def _once_each(repeats: torch.Tensor, **_: object) -> torch.Tensor:
    """Returns the number of each row, repeated."""
    return torch.empty_like(repeats)


def _all_selected(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns what a mask selects: everything."""
    return tensor.new_empty(mask.numel())


def _all_different(tensor: torch.Tensor, *_: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns distinct numbers, where they went, and how many there were of each."""
    return tensor.flatten(), *(tensor.new_empty(tensor.shape, dtype=torch.int64) for _ in range(2))


def _are_equal(*_: torch.Tensor) -> bool:
    return True


def _counted(tensor: torch.Tensor, weights: None = None, minlength: int = 0) -> torch.Tensor:
    """Returns how often each number occurs, up to those that are expected."""
    return tensor.new_empty(minlength)


def _all_of(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> Any:
    """Returns what a mask selects: everything. Indices that are no masks are no question."""
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return NotImplemented
    (mask,) = indices
    return tensor.new_empty(math.prod(mask.shape), *tensor.shape[mask.dim() :])


def _written_to_out(*_: torch.Tensor, out: torch.Tensor, **__: object) -> torch.Tensor:
    """Returns a product that is wider than its factors, which torch computes on a GPU only."""
    return out


ANSWERS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    # What an operator of our own asks for reaches us before it is taken apart.
    aten.is_nonzero.default: _scalar,
    aten.nonzero.default: _none_found,
    aten.repeat_interleave.self_Tensor: _entries_of_rows,
    aten.repeat_interleave.Tensor: _once_each,
    aten.masked_select.default: _all_selected,
    aten._unique2.default: _all_different,
    aten.unique_consecutive.default: _all_different,
    aten.equal.default: _are_equal,
    aten.bincount.default: _counted,
    aten.index.Tensor: _all_of,
    aten.mm.dtype_out: _written_to_out,
    aten.addmm.dtype_out: _written_to_out,
}


_VIEWS = (aten.view.default, aten._unsafe_view.default)


def _with_real_strides(view: torch.Tensor) -> torch.Tensor:
    """Returns a view with the strides of a real one: torch gives fake ones others in dimensions of one entry.

    By that of a row (1, T, H), its product with a frozen weight is one of matrices or of batches.
    """
    strides = tuple(itertools.accumulate(reversed(view.shape[1:]), int.__mul__, initial=1))[::-1]
    if not view.is_contiguous() or not view.dim() or view.stride() == strides:
        return view
    return view.as_strided(view.shape, strides)


def run_on_fakes(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Returns an operator's result on fake tensors: what is known of it, else an answer, else what torch makes."""
    if func in ANSWERS:
        if func is not aten.index.Tensor and (known := known_result(func, args, kwargs)) is not None:
            return as_fake(args[0], known)
        args = without_masks(func, args)
        out = ANSWERS[func](*args, **kwargs)
        if out is not NotImplemented:
            return out
    out = func(*without_masks(func, args), **kwargs)
    return _with_real_strides(out) if func in _VIEWS else out
