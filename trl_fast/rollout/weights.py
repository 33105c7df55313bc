"""Yields a policy's weights under their checkpoint's names, its adapter merged in, for another engine to load."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from trl_fast.modeling.loading import base_model

_BASE, _COPIES, _REPLACED = ".base_layer", ".modules_to_save.", ".original_module."

Found = tuple[str, torch.nn.Parameter, BaseTunerLayer | None]


def weight_metadata(model: PreTrainedModel | PeftModel) -> list[tuple[str, str, list[int]]]:
    """Returns name, dtype such as bfloat16, and shape of each weight, in the order of `merged_weights`."""
    return [
        (name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape))
        for name, parameter, _ in _checkpoint_parameters(model)
    ]


def merged_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights one after the other, tied ones once. The model stays as it is, to the last bit.

    An adapter is merged into a copy, one layer at a time: merging it into the model and taking it out again, as TRL
    does, leaves rounding errors in the model's weights.
    """
    for layer, found in groupby(_checkpoint_parameters(model), key=lambda item: item[2]):
        if layer is None:
            yield from ((name, parameter.data) for name, parameter, _ in found)
        else:
            merged = _merged(layer)
            yield from ((name, merged[name.rpartition(".")[2]]) for name, _, _ in found)


def _checkpoint_parameters(model: PreTrainedModel | PeftModel) -> Iterator[Found]:
    """Yields name in a checkpoint, parameter, and the adapter's layer around it."""
    inner = base_model(model)
    if not isinstance(model, PeftModel):
        yield from ((name, parameter, None) for name, parameter in inner.named_parameters())
        return
    active, prefix = f"{_COPIES}{model.active_adapter}.", cast("Any", model.base_model).prefix
    for name, parameter in inner.named_parameters():
        if prefix in name or _REPLACED in name or (_COPIES in name and active not in name):
            continue
        path, wrapped, _ = name.partition(_BASE)
        layer: Any = inner.get_submodule(path) if wrapped else None
        yield name.replace(active, ".").replace(_BASE, ""), parameter, layer


@torch.no_grad()
def _merged(layer: BaseTunerLayer) -> dict[str, torch.Tensor]:
    """Returns copies of the parameters of the layer under an adapter, as they are with the adapter merged."""
    base = layer.get_base_layer()
    before = {name: parameter.clone() for name, parameter in base.named_parameters(recurse=False)}
    layer.merge()
    try:
        return {name: parameter.clone() for name, parameter in base.named_parameters(recurse=False)}
    finally:
        layer.unmerge()
        for name, parameter in base.named_parameters(recurse=False):
            parameter.copy_(before[name])
