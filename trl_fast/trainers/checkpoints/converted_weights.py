"""Reads the weights of checkpoints that are written under other names than those of the model.

transformers writes a model as its family is published: Nemotron-H's modules under older names, a mixture's experts one
by one where the model has them fused. `from_pretrained` changes that back. transformers' Trainer does not: it looks up
the model's own names in the file, and weights that it does not find there stay as they are.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)


def load_converted_weights(folder: Path, model: torch.nn.Module, *, is_split: bool) -> None:
    """Gives a model the weights of a checkpoint's folder if they have other names there than in the model.

    A model with an adapter has its weights elsewhere, and is left as it is.

    Args:
        folder: the checkpoint's.
        model: the model, in no wrapper.
        is_split: whether processes hold parts of its weights.

    Raises:
        NotImplementedError: they would have to be read into a model that is split.
        RuntimeError: weights of the model are missing, or have other shapes.
    """
    if not isinstance(model, PreTrainedModel) or _weight_names(folder) <= set(model.state_dict()):
        return
    name = type(model).__name__
    if is_split:
        raise NotImplementedError(
            f"{folder}: its weights have the names that {name} is published with, which cannot be read into a model "
            "that tensor parallelism splits; leave tp_size out to go on from it"
        )
    logger.warning(
        f"{folder}: its weights have the names that {name} is published with. They are read by from_pretrained, so a "
        "line before this one about missing keys means nothing."
    )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    loaded = type(model).from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.load_state_dict(loaded.state_dict())


def _weight_names(folder: Path) -> set[str]:
    """Returns the names of the weights in a folder's safetensors files; none if there are no such files."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())
