"""Upcasts linear layers: on a CPU without hardware for 16-bit products, those of linear layers run in float32."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_fast.ops.device import device_facts
from trl_fast.ops.linear import linear, upcast_is_faster
from trl_fast.ops.validation import refuse_forward_mode

from .fused_layers.bare_modules import is_linear
from .loading import backbone, whole_backbone
from .model_changes import changes_of, unbound_forward

UPCAST = "upcast linear layers"
# What was true of a model when its linear layers were last looked at.
_SEEN = "trl_fast_upcast_seen"


def upcast_linear_layers(model: PreTrainedModel) -> None:
    """Lets the linear layers of a model compute in float32 wherever that is faster; see ops/linear.py.

    They are changed only while that can be: on a CPU without 16-bit products, of a model with 16-bit weights or under
    autocast. The model may be moved or cast later: its first weight tells before its layers run. Where other weights
    alone were cast, a further call looks at all of them. What is changed decides call by call. Products of other
    modules, such as fused experts, stay as they are.
    """
    changes = changes_of(model)
    if UPCAST in changes:
        setattr(model, _SEEN, None)
        _follow(model)
        return
    change = changes.get_or_add(
        UPCAST, "linear layers compute 16-bit products in float32 on a CPU without hardware for them"
    )
    change.set(model, "trl_fast_upcast", False, fixed=False)
    change.set(model, _SEEN, None, fixed=False)
    change.on_undo(_restore_layers, model)
    # The whole class reads images before its text model runs.
    for module in dict.fromkeys((whole_backbone(model), backbone(model))):
        change.add_hook(module.register_forward_pre_hook(functools.partial(_follow, model)))
    _follow(model)


def _follow(model: PreTrainedModel, *_of_hook: object) -> None:
    """Changes a model's linear layers, or changes them back, as its device and numbers ask."""
    if torch.compiler.is_compiling():
        return
    layers = whole_backbone(model)
    first = next(layers.parameters())
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    slow = device_facts(torch.device("cpu")).product_dtypes
    # All weights are looked at only when something has changed: in each pass that took 2% of a narrow model's step.
    seen = first.device, first.dtype, autocast, slow
    if seen == getattr(model, _SEEN):
        return
    setattr(model, _SEEN, seen)
    # Once changed they stay so on a CPU: backward may compute again what another dtype's pass came after.
    upcast = first.device.type == "cpu" and (
        model.trl_fast_upcast or not slow.keys().isdisjoint(_dtypes(layers, autocast))
    )
    if upcast == model.trl_fast_upcast:
        return
    changed: Any = model
    changed.trl_fast_upcast = upcast
    modules: list[Any] = [*model.modules()]
    for module in modules:
        plain = is_linear(module) and not _is_changed(module)
        if upcast and plain:
            module.plain_forward = unbound_forward(module) if "forward" in vars(module) else nn.Linear.forward
            module.forward = types.MethodType(_forward, module)
        elif not upcast and _is_upcast(module):
            _restore_layer(module)


def _is_changed(module: nn.Module) -> bool:
    """Returns whether a module itself was changed: PEFT's wrappers answer for the layer inside too."""
    return "plain_forward" in vars(module)


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
    changed = [module for module in model.modules() if _is_changed(module)]
    if not all(map(_is_upcast, changed)):
        raise RuntimeError(f"{UPCAST!r} cannot be undone: forward of a linear layer has been changed since")
    for module in changed:
        _restore_layer(module)


def _dtypes(layers: nn.Module, autocast: torch.dtype | None) -> set[torch.dtype]:
    """Returns the dtypes that numbers are multiplied in, where the device does not choose others."""
    return {weight.dtype for weight in layers.parameters()} if autocast is None else {autocast}


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
