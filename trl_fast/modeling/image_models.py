"""Tells what a model wants to know of images in the rows of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image
from transformers import PretrainedConfig, PreTrainedModel

from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.images.reader import ImageReader, reads_images_one_by_one
from trl_fast.data.token_trees import Tree
from trl_fast.parallel.engines import original_class

from .loading import whole_backbone
from .verification import ImageProbes

# Keywords of forward functions that say which tokens are of images.
_TYPE_NAMES = ("mm_token_type_ids", "token_type_ids")
# Families whose attention lets the tokens of an image see each other, by `model_type`, and the value of their text
# config's `use_bidirectional_attention` with which they do; None: with any.
_SEES_BOTH_WAYS = {"gemma3": None, "gemma4": "vision", "paligemma": None}
# Those of them in which all tokens of a prompt with images see each other.
_WHOLE_PROMPTS = ("paligemma",)


@dataclass(frozen=True)
class AxisPositions:
    """Gives the positions of a sequence with images by a family's own function, `get_rope_index` (M-RoPE).

    It needs the config and no weights, runs on the CPU, and can be pickled to the workers of a DataLoader.

    - `model_class`: the class that has the function; it reads the model's config alone.
    - `config`: that of the model.
    - `image_token_id`: the token that stands for a part of an image.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    image_token_id: int

    def __call__(self, ids: list[int], images: Sequence[ImageInput]) -> torch.Tensor:
        """Returns the positions (axes, length) int64 of a sequence's token ids with their images."""
        input_ids = torch.tensor([ids], dtype=torch.int64)
        grids = [image.tensors["image_grid_thw"] for image in images]
        shell = self.model_class.__new__(self.model_class)
        vars(shell)["config"] = self.config
        positions, _ = shell.get_rope_index(  # type: ignore[operator]
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == self.image_token_id).int(),
            image_grid_thw=torch.cat(grids) if grids else None,
        )
        return positions[:, 0]


def image_probes(reader: ImageReader, layout: ImageLayout) -> ImageProbes:
    """Returns short conversations with different pictures of noise to try layouts out on, as a processor reads them.

    One of them has two pictures, where the processor reads those one by one.
    """
    trees = []
    for count in (1, 2) if reads_images_one_by_one(reader) else (1,):
        pictures = [_noise(seed=10 * count + index) for index in range(count)]
        parts = [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": "What is it?"}]
        answers = [reader.text_ids(answer) for answer in ("It is blue.", "Green, and bright.", "No.")]
        ids = reader.prompt_ids([{"role": "user", "content": parts}])
        trees.append(Tree(ids, answers, tuple(map(reader.image_input, pictures))))
    return ImageProbes(layout, trees)


def _noise(seed: int) -> Image.Image:
    side = 64
    pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def image_layout(model: PreTrainedModel) -> ImageLayout:
    """Returns what laying out a batch needs to know of a model that reads images.

    Raises:
        ValueError: the model has no token for images.
    """
    config, name = model.config, type(model).__name__
    token = getattr(config, "image_token_id", None)
    if not isinstance(token, int):
        raise ValueError(
            f"{name} has no image token (its config has no image_token_id), so images have no place in it"
        )
    inner = whole_backbone(model)
    # Classifiers hand the keywords on without naming them.
    taken = inspect.signature(original_class(inner).forward).parameters
    positions = None
    if hasattr(inner, "get_rope_index"):
        positions = AxisPositions(cast(type[PreTrainedModel], original_class(inner)), config, token)
    return ImageLayout(
        token,
        tuple(each for each in _TYPE_NAMES if each in taken),
        positions,
        _sees_both_ways(config),
        whole_prompts=config.model_type in _WHOLE_PROMPTS,
    )


def _sees_both_ways(config: PretrainedConfig) -> bool:
    if config.model_type not in _SEES_BOTH_WAYS:
        return False
    needed = _SEES_BOTH_WAYS[config.model_type]
    return needed is None or getattr(config.get_text_config(), "use_bidirectional_attention", None) == needed
