"""Counts the bytes that operators on fake tensors read from memory and write to it.

One rule serves all operators: what an operator is given is read once from memory, what it returns is written once.
What it changes in place is read and written, what it gets as `out` is written. A tensor repeated by strides of zero
counts once, the same tensor given twice too. Views, and tensors that are only made, are free. The table of exceptions
below has those that touch less than they are given, and those that overwrite what they change.

Bytes of an operator include what stays in the cache between two operators: a number of bytes written by one and read
by the next counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from trl_fast.ops.divergence.row_kernels import num_sweeps

# Operators that only make or describe tensors.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "is_pinned"}
# In place, without a look at what was there.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
# They read the rows that an index asks for, not the whole tensor that it points into.
_GATHERING = {"index", "index_select", "gather", "embedding", "take"}
# They write as much as they are given to put somewhere; those in the second line add it to what is there.
_SCATTERING = {"index_copy_", "index_put_", "scatter_"}
_ADDING = {"index_add_", "scatter_add_"}
# AdamW's schema has gradients as changed, for a scaler that is not there.
_ONLY_READ = {("_fused_adamw_", "grads")}


def touched(
    func: torch._ops.OpOverload,
    given: dict[str, Any],
    tensors: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
) -> tuple[int, int]:
    """Counts the bytes that an operator reads and writes. given: arguments by name; tensors: those on the
    device, of any shape."""
    name = name_of(func)
    changed, overwritten = _changed(func, given, tensors)
    there = {tensor.untyped_storage()._cdata for tensor in tensors}
    made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in there]
    if not changed and not made:
        return 0, 0
    written = extent(made) + extent(changed)
    if name in _GATHERING:
        return extent([t for t in tensors if not t.is_floating_point()]) + written, written
    if (name in _SCATTERING or name in _ADDING) and not has_mask(given.get("indices")):
        put = [tensor for tensor in tensors if all(tensor is not other for other in changed)]
        values = extent([tensor for tensor in put if tensor.dtype == changed[0].dtype])
        return extent(put) + (values if name in _ADDING else 0), values
    read = extent([tensor for tensor in tensors if id(tensor) not in overwritten])
    return read + (_read_again(given) if name == "row_divergence" else 0), written


def _read_again(given: dict[str, Any]) -> int:
    """Counts the bytes that the kernel of divergences reads more than once. given: its arguments by name."""
    sweeps = num_sweeps(given["mixture"], given["is_tvd"], given.get("gradient") is not None)
    return (sweeps - 1) * extent([given["student"], given["teacher"]])


def name_of(func: torch._ops.OpOverload) -> str:
    """Returns the operator's name without its namespace and overload."""
    return func._schema.name.rpartition("::")[2]


def by_name(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Returns an operator's arguments by their names."""
    names = (argument.name for argument in func._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _changed(
    func: torch._ops.OpOverload, given: dict[str, Any], tensors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], set[int]]:
    """Returns the tensors that an operator changes in place, and which of them (by id) it only writes."""
    changed: list[torch.Tensor] = []
    overwritten: set[int] = set()
    counted = set(map(id, tensors))
    for argument in func._schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        found = [leaf for leaf in tree_leaves(given.get(argument.name)) if id(leaf) in counted]
        if (name_of(func), argument.name) in _ONLY_READ:
            continue
        changed.extend(found)
        if _is_result(func, argument.name) or name_of(func) in _OVERWRITING or given.get("beta") == 0:
            overwritten.update(map(id, found))
    inputs = {
        id(leaf)
        for argument in func._schema.arguments
        if argument.alias_info is None and not (argument.name == "self" and given.get("beta") == 0)
        for leaf in tree_leaves(given.get(argument.name))
    }
    # What comes as an operand too, as the sum in addmm(total, a, b, out=total), is read.
    return changed, overwritten - inputs


def has_mask(indices: Any) -> bool:
    """Says whether one of an operator's indices is a mask: a tensor of bool or uint8."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices or ())


def _is_result(func: torch._ops.OpOverload, argument: str) -> bool:
    """Says whether an operator only writes what it changes: our row kernels look at nothing but the rows' state."""
    return argument == "out" or (func.namespace == "trl_fast" and argument != "state")


def extent(tensors: list[torch.Tensor]) -> int:
    """Counts the bytes of tensors of any shape, each once; repetitions by a stride of zero are there once."""
    sizes = {}
    for tensor in tensors:
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        lengths = zip(tensor.shape, tensor.stride(), strict=True)
        sizes[key] = math.prod(size for size, stride in lengths if stride or not size) * tensor.element_size()
    return sum(sizes.values())
