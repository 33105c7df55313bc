"""Loads a model from a folder once, and copies it from then on: a tiny model is loaded as long as it trains a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

# What the arguments of `from_pretrained` may be; the others are for models that are quantised or spread out.
_PLAIN = {"config", "dtype", "trust_remote_code", "attn_implementation", "num_labels", "revision"}
_PLAIN |= {"output_loading_info", "_from_auto"}


def loaded_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.from_pretrained`, a function of the class, that loads what a folder holds once."""
    kept: dict[Hashable, Any] = {}

    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        key = _key(cls, name, kwargs) if not args else None
        if key in kept:
            return copy.deepcopy(kept[key])
        random = torch.get_rng_state()
        loaded = load(cls, name, *args, **kwargs)
        # A head that the folder lacks is drawn anew each time.
        if key is not None and torch.equal(random, torch.get_rng_state()):
            kept[key] = copy.deepcopy(loaded)
        return loaded

    return from_pretrained


def _key(cls: type, name: Any, kwargs: dict[str, Any]) -> Hashable:
    """Everything that the model depends on; None where that is not known."""
    folder, config = Path(str(name)), kwargs.get("config")
    known = {name for name, value in kwargs.items() if value is not None} <= _PLAIN
    if not known or not folder.is_dir() or getattr(config, "quantization_config", None):
        return None
    files = tuple(sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir()))
    settings = {**kwargs, "config": vars(config) if config is not None else None}
    return cls, str(folder), files, torch.get_default_dtype(), repr(settings)
