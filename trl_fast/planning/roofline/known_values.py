"""Follows the values of whole numbers and masks of the batch, on which the amount of work depends.

Fake tensors have no data, but which tokens a loss counts, how long sequences are and where they begin is in integer
and bool tensors that the collator made. Whatever is computed from such tensors alone is computed for real beside the
simulation, and the fake tensor carries the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_LARGEST = 1 << 22
_ATTRIBUTE = "_known_values"
_CPU = torch.device("cpu")
# Nothing is known of what they give, whatever they are given.
_UNKNOWN = ("empty", "new_empty", "_local_scalar_dense")


def values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Returns the values of a tensor of any shape as a tensor on the CPU; None where they are not known."""
    return getattr(tensor, _ATTRIBUTE, None) if isinstance(tensor, FakeTensor) else tensor


def know(tensor: torch.Tensor, values: torch.Tensor | None) -> None:
    """Lets a fake tensor carry values, of its shape and dtype; None: they are not known."""
    setattr(tensor, _ATTRIBUTE, values)


def known_result(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    """Returns an operator's result for arguments whose values are all known, on the CPU; None if some are not."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(values_of(tensor) is None or tensor.numel() > _LARGEST for tensor in tensors):
        return None
    args, kwargs = tree_map_only(torch.Tensor, values_of, (args, kwargs))
    kwargs = {name: _CPU if name == "device" and value is not None else value for name, value in kwargs.items()}
    kwargs.pop("pin_memory", None)
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def follow(func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any) -> None:
    """Computes beside an operator that ran on fake tensors what is known of its results."""
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
    if not results or any(_is_out_of_scope(result) for result in results):
        return
    if func is aten._pin_memory.default:
        found = values_of(args[0])
    else:
        unknown = func._schema.name.removeprefix("aten::").startswith(_UNKNOWN) or func.namespace != "aten"
        found = None if unknown else known_result(func, args, kwargs)
    known: list[torch.Tensor | None] = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    for result, value in zip(results, known or [None] * len(results), strict=True):
        know(result, value)


def _is_out_of_scope(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or math.prod(tensor.shape) > _LARGEST


def without_masks(func: torch._ops.OpOverload, args: tuple) -> tuple:
    """Returns the arguments of an indexing operator with known masks as the indices that they stand for."""
    if func not in (aten.index.Tensor, aten.index_put_.default):
        return args
    indices: list[torch.Tensor | None] = []
    for index in args[1]:
        mask = None if index is None or index.dtype != torch.bool else values_of(index)
        indices += [index] if mask is None else _places(index, mask)
    return (args[0], indices, *args[2:])


def _places(mask: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    with unset_fake_temporarily():
        places = values.nonzero(as_tuple=True)
    found = []
    for place in places:
        index = mask.new_empty(place.shape, dtype=torch.int64)
        know(index, place)
        found.append(index)
    return found


def as_fake(like: torch.Tensor, result: Any) -> Any:
    """Returns a known result as fake tensors beside `like`, of any shape; numbers stay as they are."""

    def fake(values: torch.Tensor) -> torch.Tensor:
        made = like.new_empty(values.shape, dtype=values.dtype)
        if not _is_out_of_scope(made):
            know(made, values)
        return made

    return tree_map_only(torch.Tensor, fake, result)
