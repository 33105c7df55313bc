"""Calls linear layers that read one input: at once, where their gradients by it can be summed in their products."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trl_fast.ops.backends import KERNEL_DTYPES
from trl_fast.ops.layers import Adapter, joint_linear
from trl_fast.ops.matmul import product_dtype
from trl_fast.parallel.partitions import is_partitioned

from .bare_modules import is_bare, is_linear, is_lora
from .lora_layers import served_adapter
from .try_outs import Draw, why_functions_differ

# What most tensors are, and no wrapper of others.
_WHOLE = (torch.Tensor, nn.Parameter)


class _Parts(NamedTuple):
    """Holds what a layer computes with: weight (V, H), bias (V,) or None, and an adapter or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    adapter: Adapter | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        found = [self.weight] if self.bias is None else [self.weight, self.bias]
        return found if self.adapter is None else [*found, *self.adapter[:2]]


def project(x: torch.Tensor, layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Returns what each layer makes of x (..., H), by its name.

    Their gradients by x are summed in their products where all are plain linear layers, or LoRA layers with one
    adapter on such, with nothing put upon them, of numbers of one dtype or under autocast. A compiler gets the layers
    themselves, and sums as it can.
    """
    parts = None if torch.compiler.is_compiling() else _joint_parts(x, layers.values())
    if parts is None:
        return {name: layer(x) for name, layer in layers.items()}
    return dict(zip(layers, joint_linear(x, *zip(*parts, strict=True)), strict=True))


def is_joinable(module: nn.Module) -> bool:
    """Tells whether a module is of a class whose gradient by its input may be summed with those of others."""
    return is_linear(module) or is_lora(module)


def why_joint_differs(device: torch.device, dtype: torch.dtype) -> str:
    """Tries the op on a few numbers; returns why it does not serve, empty if all agree."""
    if (device, dtype) not in _found:
        draw = Draw(device, dtype)
        tensors = draw(5, 16), draw(24, 16), draw(8, 16), draw(24), draw(8), draw(2, 16), draw(8, 2)
        _found[device, dtype] = why_functions_differ(_plainly, _at_once, tensors)
    return _found[device, dtype]


_found: dict[tuple[torch.device, torch.dtype], str] = {}


def _plainly(x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    weight, other, bias, other_bias, a, b = tensors
    return [F.linear(x, weight, bias), F.linear(x, other, other_bias) + F.linear(F.linear(x, a), b) / 2]


def _at_once(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight, other, bias, other_bias, a, b = tensors
    return joint_linear(x, (weight, other), (bias, other_bias), (None, Adapter(a, b, 0.5)))


def _joint_parts(x: torch.Tensor, layers: Collection[nn.Module]) -> list[_Parts] | None:
    """Returns the parts of layers that read x (..., H) if they can be called at once, else None."""
    if not (torch.is_grad_enabled() and x.requires_grad and x.is_contiguous()):
        return None
    kind = x.device.type
    autocasts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocasts else x.dtype
    dtypes = KERNEL_DTYPES if autocasts else (dtype,)
    # Elsewhere products of 16-bit numbers have ways of their own.
    if product_dtype(dtype, x.device) != dtype or not _serves(x, x.device, dtypes):
        return None
    found: list[_Parts] = []
    for layer in layers:
        parts = _parts_of(layer, x)
        if parts is None or not all(_serves(tensor, x.device, dtypes) for tensor in parts.tensors):
            return None
        found.append(parts)
    return found


def _serves(tensor: torch.Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Tells whether a tensor of any shape lies on a device as a whole, in one of the dtypes."""
    is_whole = type(tensor) in _WHOLE or not is_traceable_wrapper_subclass(tensor)
    return is_whole and tensor.dtype in dtypes and tensor.device == device and not is_partitioned(tensor)


def _parts_of(layer: Any, x: torch.Tensor) -> _Parts | None:
    """Returns the parts of a layer that has nothing put upon it and reads x; None of one that does something else."""
    if not is_bare(layer):
        return None
    if is_linear(layer):
        return _Parts(layer.weight, layer.bias, None)
    adapter = served_adapter(layer, x) if is_lora(layer) else None
    return None if adapter is None else _Parts(layer.base_layer.weight, layer.base_layer.bias, adapter)
