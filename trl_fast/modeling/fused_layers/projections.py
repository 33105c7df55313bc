"""Calls linear layers that read one input: at once, where their gradients by it can be summed in their products."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trl_fast.ops.backends import KERNEL_DTYPES
from trl_fast.ops.layers import joint_linear
from trl_fast.ops.matmul import product_dtype
from trl_fast.parallel.partitions import is_partitioned

from .bare_modules import is_bare, is_linear
from .try_outs import Draw, why_functions_differ


def project(x: torch.Tensor, layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Returns what each layer makes of x (..., H), by its name.

    Their gradients by x are summed in their products where all are plain linear layers with nothing put upon them, of
    numbers of one dtype or under autocast. A compiler gets the layers themselves, and sums as it can.
    """
    if torch.compiler.is_compiling() or not _are_joint(x, layers.values()):
        return {name: layer(x) for name, layer in layers.items()}
    plain: list[Any] = [*layers.values()]
    made = joint_linear(x, [layer.weight for layer in plain], [layer.bias for layer in plain])
    return dict(zip(layers, made, strict=True))


def why_joint_differs(device: torch.device, dtype: torch.dtype) -> str:
    """Tries the op on a few numbers; returns why it does not serve, empty if all agree."""
    if (device, dtype) not in _found:
        draw = Draw(device, dtype)
        tensors = draw(5, 16), draw(24, 16), draw(8, 16), draw(24), draw(8)
        plainly = lambda x, a, b, c, d: [F.linear(x, a, c), F.linear(x, b, d)]  # noqa: E731
        ours = lambda x, a, b, c, d: joint_linear(x, (a, b), (c, d))  # noqa: E731
        _found[device, dtype] = why_functions_differ(plainly, ours, tensors)
    return _found[device, dtype]


_found: dict[tuple[torch.device, torch.dtype], str] = {}


def _are_joint(x: torch.Tensor, layers: Collection[Any]) -> bool:
    if not (torch.is_grad_enabled() and x.requires_grad and x.is_contiguous()):
        return False
    if not all(is_linear(layer) and is_bare(layer) for layer in layers):
        return False
    kind = x.device.type
    autocasts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocasts else x.dtype
    tensors = [x, *(tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None)]
    # Elsewhere products of 16-bit numbers have ways of their own.
    return product_dtype(dtype, x.device) == dtype and all(
        tensor.device == x.device
        and tensor.dtype in (KERNEL_DTYPES if autocasts else (dtype,))
        and not is_traceable_wrapper_subclass(tensor)
        and not is_partitioned(tensor)
        for tensor in tensors
    )
