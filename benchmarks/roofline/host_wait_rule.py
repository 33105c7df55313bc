"""Says which operators on fake tensors make the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from trl_fast.planning.roofline.bytes_moved import has_mask

from .fake_devices import is_on_gpu

# Operators that read a number or need one to know their result's size.
_READING = frozenset(
    ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount")
    + ("_unique2", "unique_dim", "unique_consecutive")
)
_INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


def makes_host_wait(
    func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any, pinned: Container[torch.Tensor] | None = None
) -> bool:
    """Says whether an operator, run on fake tensors, makes the host wait for the GPU.

    It reads numbers, needs them to know a size, or copies to or from memory that is not pinned.

    pinned: the CPU tensors in pinned memory; None: all are taken for pinned.
    """
    name = func._schema.name.rpartition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if name in ("_to_copy", "copy_"):
        source, target = (tensors[0], out) if name == "_to_copy" else (tensors[1], tensors[0])
        crosses = is_on_gpu(source) != is_on_gpu(target)
        no_wait = argument(func, args, kwargs, "non_blocking") and (is_on_gpu(source) or _is_pinned(source, pinned))
        # A number on the CPU is handed to the kernel.
        number = name == "copy_" and not is_on_gpu(source) and source.dim() == 0
        return crosses and not no_wait and not number
    if not any(map(is_on_gpu, tensors)):
        return False
    if name in _INDEXING:
        return _index_waits(name, args, pinned)
    if name == "repeat_interleave":
        return argument(func, args, kwargs, "output_size") is None
    return name in _READING


def argument(func: torch._ops.OpOverload, args: tuple, kwargs: dict, name: str) -> Any:
    """Returns an argument by name, None where it was not given."""
    names = [given.name for given in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get(name)


def _index_waits(name: str, args: tuple, pinned: Container[torch.Tensor] | None) -> bool:
    """Says whether an index has to be counted, or to be brought to the GPU first from memory that is not pinned."""
    if has_mask(args[1]):
        # One number put where a mask is set needs no count.
        return name == "index" or args[2].numel() != 1
    return pinned is not None and not all(is_on_gpu(index) for index in args[1] if index is not None)


def _is_pinned(tensor: torch.Tensor, pinned: Container[torch.Tensor] | None) -> bool:
    return pinned is None or tensor in pinned
