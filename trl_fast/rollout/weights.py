"""Yields a policy's weights under the names of published checkpoints, its adapter merged in, for another engine.

transformers keeps some families otherwise than they are published: a mixture's experts fused, Nemotron-H's modules
renamed. Other engines read the published names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from trl_fast.modeling.loading import base_model
from trl_fast.parallel.gathering import whole_module

_BASE, _COPIES, _REPLACED = ".base_layer", ".modules_to_save.", ".original_module."
# What FSDP1 puts into the names of what it has wrapped.
_WRAPPER = "_fsdp_wrapped_module."
_LAYER = re.compile(r".*?\.\d+\.")


class Found(NamedTuple):
    """Says where a parameter of a checkpoint is: its name there, its module, whether an adapter is around it."""

    name: str
    path: str
    is_adapted: bool


def weight_metadata(model: torch.nn.Module) -> list[tuple[str, str, list[int]]]:
    """Returns name, dtype such as bfloat16, and shape of each weight, in the order of `merged_weights`.

    All processes call this together: shapes of sharded weights are known where they are whole.
    """
    return [
        (name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in merged_weights(model)
    ]


def merged_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights one after the other, tied ones once, as `save_pretrained` writes them. The model stays as it
    is, to the last bit.

    Where a family is published under other names than the model's, a layer's weights are converted together, so that
    one layer is held at a time. Sharded weights are made whole a module at a time (FSDP1's: a layer at a time), so all
    processes call this together, to its end.

    model: the policy, as its engine prepared it: a causal language model or a PeftModel.
    """
    wrapped: Any = model.module if isinstance(model, FullyShardedDataParallel) else model
    inner = base_model(wrapped)
    weights = _own_weights(model)
    if not _is_published_otherwise(inner):
        yield from weights
        return
    for _, layer in groupby(weights, key=_layer_of):
        for name, weight in revert_weight_conversion(inner, dict(layer)).items():
            yield name, weight.contiguous()


def _is_published_otherwise(model: PreTrainedModel) -> bool:
    """Says whether transformers converts weights of the model when it writes them."""
    loaded_by = getattr(model, "_weight_conversions", None)
    return bool(get_model_conversion_mapping(model, add_legacy=False) if loaded_by is None else loaded_by)


def _layer_of(item: tuple[str, torch.Tensor]) -> str:
    """Returns the name of a weight's layer; of a weight outside of layers its own."""
    found = _LAYER.match(item[0])
    return found.group() if found else item[0]


def _own_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights under the model's own names.

    An adapter is merged into a copy, one module at a time: merging it into the model and taking it out again, as TRL
    does, leaves rounding errors in the model's weights.
    """
    frees_memory = isinstance(model, FullyShardedDataParallel)
    for (path, is_adapted), found in groupby([*_checkpoint_parameters(model)], key=lambda item: item[1:]):
        with whole_module(model, path, recurse=is_adapted) as module:
            weights = _merged(cast("Any", module)) if is_adapted else dict(module.named_parameters(recurse=False))
            for name, *_ in found:
                weight = weights[name.rpartition(".")[2]].data
                yield name, weight.clone() if frees_memory else weight


def _checkpoint_parameters(model: torch.nn.Module) -> Iterator[Found]:
    """Yields where each parameter of the merged checkpoint is."""
    wrapped: Any = model.module if isinstance(model, FullyShardedDataParallel) else model
    inner = base_model(wrapped)
    paths = {id(module): path for path, module in model.named_modules()}
    top = paths[id(inner)]
    top = f"{top}." if top else ""
    active = prefix = ""
    if isinstance(wrapped, PeftModel):
        active, prefix = f"{_COPIES}{wrapped.active_adapter}.", cast("Any", wrapped.base_model).prefix
    for name, _ in inner.named_parameters():
        plain = name.replace(_WRAPPER, "")
        if active and (prefix in plain or _REPLACED in plain or (_COPIES in plain and active not in plain)):
            continue
        path, adapter, _ = name.partition(_BASE)
        plain = plain.replace(active, ".") if active else plain
        path = path if adapter else name.rpartition(".")[0]
        yield Found(plain.replace(_BASE, ""), f"{top}{path}", bool(adapter))


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
