"""Makes classes of modules that compute in one pass, under the names of those whose place they take."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trl_fast.ops.layers import (
    ACTIVATIONS,
    NormCast,
    chunked_gated_activation,
    gated_activation,
    norm_and_residual,
    residual_rms_norm,
    rms_norm,
)

from .code_meaning import EPS_NAMES
from .known_code import GATED_MLP, LAYER_NORM, KnownClass, known_class
from .projections import project


class NormSettings(NamedTuple):
    """Holds what a norm computes with: its weight (H,) or None, and what `rms_norm` takes beside it."""

    weight: torch.Tensor | None
    eps: float
    cast: NormCast


def fused_class_for(module: nn.Module) -> type[nn.Module] | None:
    """Returns a class that computes in one pass what a norm's or gated MLP's own does; None for other modules.

    A module whose forward is exchanged, as by Liger, keeps it, and so does one that is fused already.
    """
    cls, known = cast("Any", type(module)), known_class(module)
    if known is None or "forward" in vars(module) or hasattr(cls, "fused_class"):
        return None
    if known.kind == GATED_MLP:
        activation = _activation_of(getattr(module, known.activation, None))
        return None if activation is None else _fused_mlp(cls, known, activation)
    eps_name = next(name for name in EPS_NAMES if hasattr(module, name))
    return _fused_layer_norm(cls, eps_name) if known.kind == LAYER_NORM else _fused_norm(cls, known, eps_name)


def make_class(cls: type[nn.Module], **methods: Callable) -> type[nn.Module]:
    """Returns a class with other methods under its name: transformers, PEFT and `print` tell modules by it.

    It is pickled as the class itself, which is the one that its name is found by.
    """
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made: Any = _pickled_type(cast("Any", type(cls)))(cls.__name__, (cls,), {**named, **methods})
    made.fused_class = made
    return made


@functools.cache
def _pickled_type(meta: type) -> type:
    """Returns a type of classes that are pickled as the classes that they are made of."""
    made: Any = type(meta.__name__, (meta,), {})
    copyreg.pickle(made, lambda fused: (_given, (fused.fused_class.__base__,)))
    return made


def _given(cls: type) -> type:
    return cls


@functools.cache
def _fused_norm(cls: type[nn.Module], known: KnownClass, eps_name: str) -> type[nn.Module]:
    def weight_of(module: Any) -> torch.Tensor | None:
        return getattr(module, "weight", None) if known.reads_weight else None

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = weight_of(self)
        if weight is not None and hidden_states.dtype != weight.dtype:
            return super(made, self).forward(hidden_states)
        return rms_norm(hidden_states, weight, getattr(self, eps_name), cast=known.cast)

    def add_and_normalize(self: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight_of(self)
        one_dtype = x.dtype == residual.dtype and (weight is None or weight.dtype == x.dtype)
        if not one_dtype or x.shape != residual.shape:
            total = residual + x
            return self.forward(total), total
        return residual_rms_norm(x, residual, weight, getattr(self, eps_name), cast=known.cast)

    def normalize_and_keep(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight_of(self)
        if weight is not None and weight.dtype != x.dtype:
            return self.forward(x), x
        return norm_and_residual(x, weight, getattr(self, eps_name), cast=known.cast)

    def settings(self: Any) -> NormSettings:
        return NormSettings(weight_of(self), getattr(self, eps_name), known.cast)

    at_once: dict[str, Callable] = {"add_and_normalize": add_and_normalize, "normalize_and_keep": normalize_and_keep}
    made = make_class(cls, forward=forward, settings=settings, **at_once)
    return made


@functools.cache
def _fused_layer_norm(cls: type[nn.Module], eps_name: str) -> type[nn.Module]:
    """Returns a class that calls PyTorch's own function: it computes in float32, and rounds once, too."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dim() != 1 or hidden_states.dtype != weight.dtype:
            return super(made, self).forward(hidden_states)
        # Autocast gives float32.
        return F.layer_norm(hidden_states, weight.shape, weight, None, getattr(self, eps_name)).to(weight.dtype)

    made = make_class(cls, forward=forward)
    return made


@functools.cache
def _fused_mlp(cls: type[nn.Module], known: KnownClass, activation: str) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if known.gate_and_up:
            return self.down_proj(chunked_gated_activation(self.gate_up_proj(x), activation))
        gate, up = project(x, {"gate_proj": self.gate_proj, "up_proj": self.up_proj}).values()
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
