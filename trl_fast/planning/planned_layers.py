"""Says what a planned model's layers mix tokens by, in which layout, and what computes those that carry a state."""

from __future__ import annotations

from collections import Counter

from transformers import PreTrainedModel

from trl_fast.modeling.layer_kernels import LayerKernel
from trl_fast.modeling.layer_kinds import ATTENTION, LayerKind, layer_kinds, mixers_of
from trl_fast.modeling.recurrent_layers import RECURRENT_LAYERS


def layers_line(model: PreTrainedModel, layout: str) -> str:
    """Returns the layout and the layers of a model in a line; for a model of plain attention the layout alone."""
    counts = Counter(map(_name, layer_kinds(model)))
    line = f"Layout: {layout}."
    if list(counts) != [ATTENTION]:
        line += f" Layers: {', '.join(f'{count} of {name}' for name, count in counts.items())}."
    missing = sorted({why for ok, why in (kernel.fitness() for kernel in _kernels_of(model)) if not ok})
    if missing:
        line += f" Those with a state are planned in transformers' PyTorch code, as here: {'; '.join(missing)}."
    return line


def refuse_kernels(model: PreTrainedModel) -> None:
    """Refuses a model whose layers run kernels of other packages here, which no simulation can.

    Raises:
        ValueError: a kernel that transformers takes for one of its layers is installed; by name and version.
    """
    installed = sorted({why for ok, why in (kernel.fitness() for kernel in _kernels_of(model)) if ok})
    if installed:
        raise ValueError(
            f"model_name_or_path: layers of {type(model).__name__} run kernels of {' and '.join(installed)} here, "
            "which cannot be simulated; plan where they are not installed: PyTorch code takes more memory and time"
        )


def _name(kind: LayerKind) -> str:
    if kind.mixer != ATTENTION:
        return kind.mixer
    parts = [ATTENTION, f"in a window of {kind.window:,} tokens" if kind.window else "", "with sinks" * kind.sinks]
    return " ".join(filter(None, parts))


def _kernels_of(model: PreTrainedModel) -> set[LayerKernel]:
    described = (RECURRENT_LAYERS.get(type(mixer).__name__) for mixer in mixers_of(model))
    return {kernel for layer in described if layer is not None for kernel in layer.kernels}
