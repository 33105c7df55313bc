"""Says what a planned model's layers mix tokens by, in which layout, and what computes those that carry a state."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import hub_kernels

from trl_fast.modeling.layer_kernels import LayerKernel
from trl_fast.modeling.layer_kinds import ATTENTION, LayerKind, layer_kinds, mixers_of
from trl_fast.modeling.recurrent_layers import RECURRENT_LAYERS
from trl_fast.parallel.engines import original_class


def layers_line(model: PreTrainedModel, layout: str) -> str:
    """Returns the layout and the layers of a model in a line; for a model of plain attention the layout alone."""
    counts = Counter(map(_name, layer_kinds(model)))
    line = f"Layout: {layout}."
    if list(counts) != [ATTENTION]:
        line += f" Layers: {', '.join(f'{count} of {name}' for name, count in counts.items())}."
    found = [kernel.fitness() for kernel in _kernels_of(model)]
    if found:
        line += " Those with a state are planned in transformers' PyTorch code"
        missing = sorted({why for ok, why in found if not ok})
        line += f", as here: {'; '.join(missing)}." if missing else "."
    if installed := installed_kernels(model):
        line += f" Here {installed} serve them, with less memory and time than planned."
    return line


def fused_layers_line(model: PreTrainedModel, asked: str | bool) -> str:
    """Says in a line which modules of a planned model run in one pass each. asked: the setting, fused_layers."""
    counts = Counter(_class_name(module) for module in model.modules() if _is_fused(module))
    if not counts:
        return "Fused layers: none" + (" of this model's code is known." if asked else ", by fused_layers=False.")
    return f"Fused layers: {', '.join(f'{count} {name}' for name, count in counts.items())}."


def _class_name(module: nn.Module) -> str:
    """Returns what a module's class is called; PEFT's have the names of PyTorch's."""
    cls = original_class(module)
    return f"LoRA {cls.__name__}" if cls.__module__.startswith("peft.") else cls.__name__


def _is_fused(module: nn.Module) -> bool:
    """Tells whether a module has a class of `modeling.fused_layers`."""
    return hasattr(type(module), "fused_class")


def installed_kernels(model: PreTrainedModel) -> str:
    """Returns the packages with versions whose kernels serve a model's layers here; an empty text without any."""
    return " and ".join(sorted({why for ok, why in (kernel.fitness() for kernel in _kernels_of(model)) if ok}))


@contextmanager
def pytorch_layers(model: PreTrainedModel) -> Iterator[None]:
    """Lets layers that carry a state run transformers' PyTorch code within, whatever kernels are installed here.

    Fake tensors have no data for compiled kernels. transformers keeps its own function behind the one that it chose.
    """
    chosen: list[tuple[dict[str, Any], str, Any]] = []
    for module in {original_class(mixer).__module__ for mixer in mixers_of(model)}:
        names = vars(sys.modules[module])
        chosen += [(names, name, value) for name, value in names.items() if _may_be_kernel(value)]
    try:
        for names, name, function in chosen:
            names[name] = inspect.unwrap(function)
        yield
    finally:
        for names, name, function in chosen:
            names[name] = function


def _may_be_kernel(value: object) -> bool:
    """Returns whether a value is a function that transformers takes from a package where that is installed."""
    is_chosen = isinstance(value, FunctionType) and value.__code__.co_filename == hub_kernels.__file__
    return is_chosen and hasattr(value, "__wrapped__")


def _name(kind: LayerKind) -> str:
    if kind.mixer != ATTENTION:
        return kind.mixer
    parts = [ATTENTION, f"in a window of {kind.window:,} tokens" if kind.window else "", "with sinks" * kind.sinks]
    return " ".join(filter(None, parts))


def _kernels_of(model: PreTrainedModel) -> set[LayerKernel]:
    described = (RECURRENT_LAYERS.get(type(mixer).__name__) for mixer in mixers_of(model))
    return {kernel for layer in described if layer is not None for kernel in layer.kernels}
