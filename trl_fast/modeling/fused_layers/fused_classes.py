"""Makes classes of modules that compute in one pass, under the names of those whose place they take."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trl_fast.ops.layers import ACTIVATIONS, gated_activation, rms_norm

from .code_meaning import EPS_NAMES
from .known_code import GATED_MLP, KnownClass, known_class


def fused_class_for(module: nn.Module) -> type[nn.Module] | None:
    """Returns a class that computes in one pass what a norm's or gated MLP's own does; None for other modules.

    A module whose forward is exchanged, as by Liger, keeps it, and so does one that is fused already.
    """
    cls = cast("type[nn.Module]", type(module))
    known = known_class(cls)
    if known is None or "forward" in vars(module) or hasattr(cls, "fused_class"):
        return None
    if known.kind == GATED_MLP:
        activation = _activation_of(getattr(module, known.activation, None))
        return None if activation is None else _fused_mlp(cls, known, activation)
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    return _fused_norm(cls, known, next(name for name in EPS_NAMES if hasattr(module, name)))


def make_class(cls: type[nn.Module], **methods: Callable) -> type[nn.Module]:
    """Returns a class with other methods under its name: transformers, PEFT and `print` tell modules by it.

    Its modules are pickled as those of the class itself, which is the one that its name is found by.
    """
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made = type(cls.__name__, (cls,), {**named, **methods, "__reduce_ex__": _reduce, "__deepcopy__": _copy})
    cast("Any", made).fused_class = made
    return made


def _reduce(self: Any, _protocol: object) -> tuple:
    return _new, (self.fused_class.__base__,), vars(self)


def _new(cls: type) -> object:
    return cls.__new__(cls)


def _copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copied = memo[id(self)] = type(self).__new__(type(self))
    copied.__dict__.update(copy.deepcopy(vars(self), memo))
    return copied


@functools.cache
def _fused_norm(cls: type[nn.Module], known: KnownClass, eps_name: str) -> type[nn.Module]:
    cast_as = cast("Any", known.cast)

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super(made, self).forward(hidden_states)
        return rms_norm(hidden_states, self.weight, getattr(self, eps_name), cast=cast_as)

    made = make_class(cls, forward=forward)
    return made


@functools.cache
def _fused_mlp(cls: type[nn.Module], known: KnownClass, activation: str) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if known.gate_and_up else (self.gate_proj(x), self.up_proj(x))
        if gate.dtype != up.dtype or gate.shape != up.shape:
            return self.down_proj(getattr(self, known.activation)(gate) * up)
        return self.down_proj(gated_activation(gate, up, activation))

    return make_class(cls, forward=forward)


def _activation_of(function: object) -> str | None:
    """Returns the name of the activation that a function computes, by its numbers; None if it is not known."""
    if not callable(function) or (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
        return None
    # A plan's tensors have no numbers.
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.linspace(-6, 6, 193, device="cpu")
        found = function(x.clone())
        for name in ACTIVATIONS:
            known = gated_activation(x, torch.ones_like(x), name, backend="torch")
            if isinstance(found, torch.Tensor) and torch.allclose(found, known, rtol=0, atol=2e-6):
                return name
    return None
