"""Caches the scores of a reference policy beside the files of a dataset, under a hash of the policy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from trl_fast.parallel.agreement import largest_over_ranks, together
from trl_fast.parallel.partitions import whole_parameters

from .reference_policy import reference_adapter


def reference_hash(model: PreTrainedModel | PeftModel, adapter: str | None = None) -> str:
    """Hashes all that makes a reference policy (SHA-256): its configuration, and names, dtypes and values of its
    weights and buffers. The hash is the key under which its scores are cached.

    Of a PeftModel's adapters only the one that is the reference counts, as in `adapter_reference`.
    """
    configs, others = [_plain_config(model.config)], set()
    if isinstance(model, PeftModel):
        chosen = reference_adapter(model, adapter)
        others = set(model.peft_config) - {chosen}
        configs += [_plain_config(model.peft_config[chosen])] if chosen is not None else []
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=_plain_value).encode())
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(name for name in named if not others & set(name.split("."))):
        with whole_parameters([named[name]]):
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
    *,
    writes: bool,
) -> Dataset:
    """Returns `dataset` with the columns of `compute`, computed once and cached beside the files of the dataset.

    A dataset without files has nothing beside which a later run would find them, so it is not cached.

    key: all that the numbers depend on besides the dataset. compute: gives whole columns in every process, each of
    which it asks for its share. writes: whether this process is the one of its machine that writes the cache.
    """
    cache_file = dataset._get_cache_file_path(Hasher.hash((dataset._fingerprint, key)))
    # Processes may have folders of their own.
    if not largest_over_ranks(int(not os.path.exists(cache_file))):
        columns = Dataset.from_file(cache_file)
        return concatenate_datasets([dataset, columns], axis=1)
    columns = Dataset.from_dict(compute())

    def write() -> None:
        if writes and dataset.cache_files:
            columns.map(lambda row: row, cache_file_name=cache_file, desc="Caching reference log-probs")

    together(write)
    return concatenate_datasets([dataset, columns], axis=1)
