"""Models in 16-bit numbers on a CPU without hardware for their products: those of linear layers run in float32."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_fast.ops.products import product_dtype
from trl_fast.ops.wide_linear import serves_wide, wide_linear

from .loading import backbone, unbound_forward


def widen_products(model: PreTrainedModel) -> None:
    """Lets the linear layers of a model compute in float32 wherever that is faster; see ops/wide_linear.py.

    They are changed only while that can be: on a CPU without 16-bit products, of a model with 16-bit weights or under
    autocast. The model may be moved or cast later: that is looked at before its layers run. What is changed decides
    call by call. Products of other modules, such as fused experts, stay as they are.
    """
    if hasattr(model, "trl_fast_wide"):
        return
    model.trl_fast_wide = False
    layers = backbone(model)
    layers.register_forward_pre_hook(functools.partial(_follow, model))
    _follow(model, layers, ())


def _follow(model: PreTrainedModel, layers: nn.Module, _args: object) -> None:
    """Changes a model's linear layers, or changes them back, as its device and numbers ask."""
    if torch.compiler.is_compiling():
        return
    on_cpu = next(layers.parameters()).device.type == "cpu"
    # Once changed they stay so on a CPU: backward may compute again what another dtype's pass came after.
    wide = on_cpu and (model.trl_fast_wide or _multiplies_slowly(layers))
    if wide == model.trl_fast_wide:
        return
    model.trl_fast_wide = wide
    for module in model.modules():
        if wide and type(module) is nn.Linear and not hasattr(module, "forward_narrow"):
            module.forward_narrow = unbound_forward(module)
            module.forward = types.MethodType(_forward, module)
        elif not wide and getattr(vars(module).get("forward"), "__func__", None) is _forward:
            module.forward = types.MethodType(module.forward_narrow, module)
            del module.forward_narrow


def _multiplies_slowly(layers: nn.Module) -> bool:
    """Whether there are products of 16-bit numbers, for which this CPU has no hardware."""
    autocast = torch.is_autocast_enabled("cpu")
    dtypes = [torch.get_autocast_dtype("cpu")] if autocast else (weight.dtype for weight in layers.parameters())
    cpu = torch.device("cpu")
    return any(dtype.is_floating_point and product_dtype(dtype, cpu) != dtype for dtype in dtypes)


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if not serves_wide(x, dtype) or not (autocast or self.weight.dtype == dtype):
        return self.forward_narrow(self, x)
    bias = None if self.bias is None else self.bias.to(dtype)
    return wide_linear(x.to(dtype), self.weight.to(dtype), bias)
