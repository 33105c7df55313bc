"""Upcasts linear layers: on a CPU without hardware for 16-bit products, those of linear layers run in float32."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_fast.ops.linear import linear, upcast_is_faster
from trl_fast.ops.matmul import product_dtype
from trl_fast.ops.validation import refuse_forward_mode

from .fused_layers.bare_modules import is_linear
from .loading import backbone
from .model_changes import changes_of, unbound_forward

UPCAST = "upcast linear layers"


def upcast_linear_layers(model: PreTrainedModel) -> None:
    """Lets the linear layers of a model compute in float32 wherever that is faster; see ops/linear.py.

    They are changed only while that can be: on a CPU without 16-bit products, of a model with 16-bit weights or under
    autocast. The model may be moved or cast later: that is looked at before its layers run. What is changed decides
    call by call. Products of other modules, such as fused experts, stay as they are.
    """
    changes = changes_of(model)
    if UPCAST in changes:
        return
    layers = backbone(model)
    change = changes.get_or_add(
        UPCAST, "linear layers compute 16-bit products in float32 on a CPU without hardware for them"
    )
    change.set(model, "trl_fast_upcast", False, fixed=False)
    change.on_undo(_restore_layers, model)
    change.add_hook(layers.register_forward_pre_hook(functools.partial(_follow, model)))
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
    changed: Any = model
    changed.trl_fast_upcast = upcast
    modules: list[Any] = [*model.modules()]
    for module in modules:
        plain = is_linear(module) and not hasattr(module, "plain_forward")
        if upcast and plain:
            module.plain_forward = unbound_forward(module) if "forward" in vars(module) else nn.Linear.forward
            module.forward = types.MethodType(_forward, module)
        elif not upcast and _is_upcast(module):
            _restore_layer(module)


def _is_upcast(module: nn.Module) -> bool:
    """Returns whether a module's forward is ours, and nothing has been put on top of it."""
    return getattr(vars(module).get("forward"), "__func__", None) is _forward


def _restore_layer(module: Any) -> None:
    if module.plain_forward is nn.Linear.forward:
        del module.forward
    else:
        module.forward = types.MethodType(module.plain_forward, module)
    del module.plain_forward


def _restore_layers(model: PreTrainedModel) -> None:
    """Gives all linear layers of a model their own forward back.

    Raises:
        RuntimeError: something else has been put on top of ours since.
    """
    changed = [module for module in model.modules() if hasattr(module, "plain_forward")]
    if not all(map(_is_upcast, changed)):
        raise RuntimeError(f"{UPCAST!r} cannot be undone: forward of a linear layer has been changed since")
    for module in changed:
        _restore_layer(module)


def _multiplies_slowly(layers: nn.Module) -> bool:
    """Returns whether there are products of 16-bit numbers, for which this CPU has no hardware."""
    autocast = torch.is_autocast_enabled("cpu")
    dtypes = [torch.get_autocast_dtype("cpu")] if autocast else (weight.dtype for weight in layers.parameters())
    cpu = torch.device("cpu")
    return any(dtype.is_floating_point and product_dtype(dtype, cpu) != dtype for dtype in dtypes)


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if not upcast_is_faster(x, dtype) or not (autocast or self.weight.dtype == dtype):
        plain: Any = self.plain_forward
        return plain(self, x)
    bias = None if self.bias is None else self.bias.to(dtype)
    refuse_forward_mode("linear", x, self.weight)
    return linear(x.to(dtype), self.weight.to(dtype), bias)
