"""Makes the reference policy: another model, or the same one without its adapter."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from peft import LoraModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_fast.parallel.partitions import copy_partitioned, is_partitioned

from .checkpointing import disable_checkpointing, is_checkpointing
from .loading import load_causal_lm

REFERENCE_ADAPTER = "ref"
# What the names of a layer's parameters begin with, by model family.
LAYER_PATTERNS = (
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
)


def copy_as_reference(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a frozen copy of the policy as it is now.

    TRL loads the policy's checkpoint once more, and so loses what was changed since; a copy is what is meant. Only a
    model that accelerate spread over devices, or that tensor parallelism has in parts, is loaded again: hooks and
    layers of a copy would call the original's modules. Of a model that ZeRO-3 keeps in parts, each process copies its
    own.
    """
    spread = len(set(getattr(model, "hf_device_map", None) or {"": 0}.values())) > 1
    if (model.tp_size or 1) > 1:
        reference = _loaded_in_parts(model)
    elif spread:
        reference = load_causal_lm(model.config._name_or_path, dtype=model.dtype)
    elif any(is_partitioned(parameter) for parameter in model.parameters()):
        reference = copy_partitioned(model)
    else:
        reference = copy.deepcopy(model)
    return freeze(reference)


def _loaded_in_parts(model: PreTrainedModel) -> PreTrainedModel:
    """Loads the model again, in parts as it is, and gives it the weights of now: each process copies its own parts."""
    parts = model.config.distributed_config
    loaded = load_causal_lm(model.config._name_or_path, dtype=model.dtype, device_map=None, distributed_config=parts)
    with torch.no_grad():
        for own, policy in zip(loaded.parameters(), model.parameters(), strict=True):
            own.copy_(policy)
    return loaded


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes a model: evaluation mode, no gradients, no checkpointing; returns it."""
    if is_checkpointing(model):
        disable_checkpointing(model)
    return model.eval().requires_grad_(False)


def create_reference_model(
    model: torch.nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> torch.nn.Module:
    """Returns a frozen copy of a model; with num_shared_layers it shares memory with the model below that layer.

    Shared parameters are frozen in the model too. pattern: the beginning of a layer's parameter names with {layer} for
    its number; None tries those of the common families.

    Raises:
        ValueError: no parameter fits the pattern, or ZeRO-3 or tensor parallelism has sharded the parameters.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("create_reference_model cannot copy parameters that ZeRO-3 has sharded; load the model again")
    if getattr(model, "tp_size", None) not in (None, 1):
        raise ValueError(
            "create_reference_model cannot copy a model that tensor parallelism has in parts; load it again"
        )
    reference = freeze(cast("PreTrainedModel", copy.deepcopy(model)))
    if num_shared_layers is None:
        return reference
    names = [name for name, _ in model.named_parameters()]
    tried = [candidate.format(layer=num_shared_layers) for candidate in ((pattern,) if pattern else LAYER_PATTERNS)]
    first = next((part for part in tried if any(part in name for name in names)), None)
    if first is None:
        raise ValueError(
            f"num_shared_layers={num_shared_layers}: no parameter's name has any of {tried}; give pattern"
        )
    for name in itertools.takewhile(lambda name: first not in name, names):
        reference.get_parameter(name).data = model.get_parameter(name).requires_grad_(False).data
    return reference


def copy_adapter_as_reference(model: PeftModel) -> None:
    """Freezes a copy of the adapter that a model came with, that which is active, as "ref", its reference policy."""
    copy_adapter(model, model.active_adapter, REFERENCE_ADAPTER)


@torch.no_grad()
def copy_adapter(model: PeftModel, source: str, name: str) -> None:
    """Adds a frozen copy of an adapter, `source`, under another name."""
    model.add_adapter(name, model.peft_config[source])
    for parameter, twin in adapter_twins(model, source, name):
        twin.copy_(parameter)
        twin.requires_grad_(False)


def adapter_twins(model: PeftModel, source: str, name: str) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Returns each parameter of an adapter, `source`, with that of another one of its kind."""
    twins = []
    for full, parameter in model.named_parameters():
        # The adapter's name is the last part of an embedding's parameters, and the one before it of others'.
        before, is_its_own, after = f"{full}.".rpartition(f".{source}.")
        if is_its_own:
            twins.append((parameter, model.get_parameter(f"{before}.{name}.{after}".removesuffix("."))))
    return twins


def reference_adapter(model: PeftModel, adapter: str | None) -> str | None:
    """Returns the adapter that is the reference; None: the model without any."""
    return adapter or (REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None)


@contextmanager
def adapter_reference(model: PeftModel, adapter: str | None = None) -> Iterator[None]:
    """Turns the model into its reference within the context: the named adapter, else "ref", else no adapter.

    Which parameters train stays as it is, also within: peft changes it, and FSDP may take a look at that moment. So
    whoever wants no gradient of the reference says `torch.no_grad()`.
    """
    name = reference_adapter(model, adapter)
    if name is None and _are_plain_lora(model):
        with _lora_left_out(model):
            yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter() if name is None else _active_adapter(model, name):
            _set_trained(trained)
            yield
    finally:
        _set_trained(trained)


def _are_plain_lora(model: PeftModel) -> bool:
    """Tells whether a flag of each layer is all that turns the adapters off."""
    return type(model.base_model) is LoraModel and all(
        getattr(config, "bias", "none") == "none" for config in model.peft_config.values()
    )


@contextmanager
def _lora_left_out(model: PeftModel) -> Iterator[None]:
    """Turns LoRA layers off as `model.disable_adapter()` does, which asks for the state of every weight before."""
    modules: list[torch.nn.Module] = [model]
    # Three times as fast as `model.modules()`.
    for module in modules:
        modules.extend(child for child in module._modules.values() if child is not None)
    layers = [module for module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    flags = [(model, "_adapters_disabled"), *((layer, "_disable_adapters") for layer in layers)]
    before = [getattr(module, name) for module, name in flags]
    try:
        for module, name in flags:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


@contextmanager
def _active_adapter(model: PeftModel, name: str) -> Iterator[None]:
    active = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)


def _set_trained(trained: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, trains in trained:
        if parameter.requires_grad != trains:
            parameter.requires_grad_(trains)


def reference_scope(model: torch.nn.Module | None, adapter: str | None = None) -> AbstractContextManager[None]:
    """Returns the context `adapter_reference` for a PeftModel, and one without effect for others."""
    return adapter_reference(model, adapter) if isinstance(model, PeftModel) else nullcontext()
