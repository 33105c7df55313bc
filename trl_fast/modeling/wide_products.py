"""Models in 16-bit numbers on a CPU without hardware for their products: those of linear layers run in float32."""

from __future__ import annotations

import types

import torch
from torch import nn

from trl_fast.ops.wide_linear import serves_wide, wide_linear

from .loading import unbound_forward


def widen_products(model: nn.Module) -> None:
    """Lets the linear layers of a model compute in float32 wherever that is faster; see ops/wide_linear.py.

    That is decided call by call, by where the numbers are and which they are. Products of other modules, such as fused
    experts, stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and not hasattr(module, "forward_narrow"):
            module.forward_narrow = unbound_forward(module)
            module.forward = types.MethodType(_forward, module)


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if not serves_wide(x, dtype) or not (autocast or self.weight.dtype == dtype):
        return self.forward_narrow(self, x)
    bias = None if self.bias is None else self.bias.to(dtype)
    return wide_linear(x.to(dtype), self.weight.to(dtype), bias)
