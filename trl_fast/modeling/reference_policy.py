"""Makes the reference policy: another model, the same one without its adapter, or numbers computed beforehand."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

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
    model that accelerate spread over devices is loaded again: its hooks point at the original's modules.
    """
    spread = len(set(getattr(model, "hf_device_map", None) or {"": 0}.values())) > 1
    if spread:
        reference = load_causal_lm(model.config._name_or_path, dtype=model.dtype)
    else:
        reference = copy.deepcopy(model)
    return freeze(reference)


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
        ValueError: no parameter fits the pattern, or DeepSpeed ZeRO-3 has sharded the parameters.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("create_reference_model cannot copy parameters that ZeRO-3 has sharded; load the model again")
    reference = freeze(copy.deepcopy(model))
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
    """Freezes a copy of the adapter that a model came with, under the name "ref", as its reference policy."""
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                twin = model.get_parameter(name.replace(".default.", f".{REFERENCE_ADAPTER}."))
                twin.copy_(parameter)
                twin.requires_grad_(False)


def _reference_adapter(model: PeftModel, adapter: str | None) -> str | None:
    """Returns the adapter that is the reference; None: the model without any."""
    return adapter or (REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None)


@contextmanager
def adapter_reference(model: PeftModel, adapter: str | None = None) -> Iterator[None]:
    """Turns the model into its reference within the context: the named adapter, else "ref", else no adapter."""
    name = _reference_adapter(model, adapter)
    if name is None:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)
        # set_adapter makes whatever it activates trainable and freezes the rest.
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def reference_scope(model: torch.nn.Module, adapter: str | None = None):
    """Returns the context `adapter_reference` for a PeftModel, and one without effect for others."""
    return adapter_reference(model, adapter) if isinstance(model, PeftModel) else nullcontext()


def reference_hash(model: PreTrainedModel | PeftModel, adapter: str | None = None) -> str:
    """Hashes all that makes a reference policy (SHA-256): its configuration, and names, dtypes and values of its
    weights and buffers. The hash is the key under which its scores are cached.

    Of a PeftModel's adapters only the one that is the reference counts, as in `adapter_reference`.
    """
    configs, others = [_plain_config(model.config)], set()
    if isinstance(model, PeftModel):
        chosen = _reference_adapter(model, adapter)
        others = set(model.peft_config) - {chosen}
        configs += [_plain_config(model.peft_config[chosen])] if chosen is not None else []
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=_plain_value).encode())
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(name for name in named if not others & set(name.split("."))):
        tensor = named[name].detach()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain_config(config: PretrainedConfig | PeftConfig) -> dict[str, object]:
    """Returns a configuration but for where it came from."""
    origins = ("_name_or_path", "base_model_name_or_path", "transformers_version", "revision")
    return {name: value for name, value in config.to_dict().items() if name not in origins}


def _plain_value(value: object) -> object:
    """Returns text, or a sorted list, for a value that JSON has no notation for; sets have no order of their own."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def with_reference_columns(
    dataset: Dataset,
    key: tuple,
    compute: Callable[[], dict[str, list[float]]],
    everywhere: Callable[[bool], bool],
    writes: bool,
) -> Dataset:
    """Returns `dataset` with the columns of `compute`, computed once and cached beside the files of the dataset.

    A dataset without files has nothing beside which a later run would find them, so it is not cached.

    key: all that the numbers depend on besides the dataset. compute: gives whole columns in every process, each of
    which it asks for its share. everywhere: whether something is so in all processes, which may have folders of their
    own. writes: whether this process is the one of its machine that writes the cache.
    """
    cache_file = dataset._get_cache_file_path(Hasher.hash((dataset._fingerprint, key)))
    if everywhere(os.path.exists(cache_file)):
        columns = Dataset.from_file(cache_file)
    else:
        columns = Dataset.from_dict(compute())
        if writes and dataset.cache_files:
            columns.map(lambda row: row, cache_file_name=cache_file, desc="Caching reference log-probs")
    return concatenate_datasets([dataset, columns], axis=1)
