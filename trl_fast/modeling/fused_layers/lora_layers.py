"""Tells what PEFT's LoRA layers compute, where that is a plain linear layer and one adapter that is added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trl_fast.ops.backends import KERNEL_DTYPES
from trl_fast.ops.device import device_facts
from trl_fast.ops.layers import Adapter

from .bare_modules import is_bare, is_linear


def served_adapter(layer: Any, x: torch.Tensor) -> Adapter | None:
    """Returns the one adapter that a LoRA layer adds to a plain linear layer; None where ours do not serve the call.

    x: (..., H), what the layer reads.
    """
    name = _only_adapter(layer)
    if name is None:
        return None
    weight, lora_a, lora_b = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    one_dtype = x.dtype == weight.dtype == lora_a.dtype == lora_b.dtype
    # Elsewhere products of 16-bit numbers have ways of their own.
    on_gpu, autocasts = device_facts(x.device).is_cuda, torch.is_autocast_enabled(x.device.type)
    served = on_gpu if autocasts else one_dtype and (on_gpu or x.dtype == torch.float32)
    if not served or any(part.dtype not in KERNEL_DTYPES for part in (x, weight, lora_a, lora_b)):
        return None
    return Adapter(lora_a, lora_b, layer.scaling[name])


def _only_adapter(layer: Any) -> str | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    (name,) = names
    parts = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    are_plain = all(is_linear(part) and is_bare(part) for part in parts) and all(
        part.bias is None for part in parts[1:]
    )
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    return name if are_plain and not drops and isinstance(dropout, (nn.Identity, nn.Dropout)) else None
