"""Models in 16-bit numbers on a CPU without hardware for their products: those of linear layers run in float32."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_fast.ops.matmul import product_dtype
from trl_fast.ops.upcast_linear import upcast_is_faster, upcast_linear

from .loading import backbone, unbound_forward


def upcast_linear_layers(model: PreTrainedModel) -> None:
    """Lets the linear layers of a model compute in float32 wherever that is faster; see ops/upcast_linear.py.

    They are changed only while that can be: on a CPU without 16-bit products, of a model with 16-bit weights or under
    autocast. The model may be moved or cast later: that is looked at before its layers run. What is changed decides
    call by call. Products of other modules, such as fused experts, stay as they are.
    """
    if hasattr(model, "trl_fast_upcast"):
        return
    model.trl_fast_upcast = False
    layers = backbone(model)
    layers.register_forward_pre_hook(functools.partial(_follow, model))
    _follow(model, layers, ())


def _follow(model: PreTrainedModel, layers: nn.Module, _args: object) -> None:
    """Changes a model's linear layers, or changes them back, as its device and numbers ask."""
    if torch.compiler.is_compiling():
        return
    on_cpu = next(layers.parameters()).device.type == "cpu"
    # Once changed they stay so on a CPU: backward may compute again what another dtype's pass came after.
    upcast = on_cpu and (model.trl_fast_upcast or _multiplies_slowly(layers))
    if upcast == model.trl_fast_upcast:
        return
    model.trl_fast_upcast = upcast
    for module in model.modules():
        if upcast and type(module) is nn.Linear and not hasattr(module, "plain_forward"):
            module.plain_forward = unbound_forward(module)
            module.forward = types.MethodType(_forward, module)
        elif not upcast and getattr(vars(module).get("forward"), "__func__", None) is _forward:
            module.forward = types.MethodType(module.plain_forward, module)
            del module.plain_forward


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
    if not upcast_is_faster(x, dtype) or not (autocast or self.weight.dtype == dtype):
        return self.plain_forward(self, x)
    bias = None if self.bias is None else self.bias.to(dtype)
    return upcast_linear(x.to(dtype), self.weight.to(dtype), bias)
