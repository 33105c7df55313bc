"""Makes the images of a planned micro-batch: what a model's own processor makes of a blank picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoProcessor, PretrainedConfig, PreTrainedModel, Qwen2VLImageProcessorPil

from trl_fast.data.images import ImageInput, ImageReader
from trl_fast.input_errors import error_line
from trl_fast.modeling.loading import backbone, language_model_class, whole_backbone

from .fake_models import give_fake_memory, shortened
from .memory_tracker import MemoryTracker
from .model_shapes import IMAGE_PROCESSORS, shape_name

# Their towers drop the padding of images, which only the values of a tensor tell; fake tensors have none.
_PADDED_IMAGES = ("gemma4",)
_SIZE = re.compile(r"(\d+)[x×](\d+)")


def parse_image_size(text: str) -> tuple[int, int]:
    """Returns width and height in pixels of a text such as 1280x720.

    Raises:
        ValueError: the text is no size.
    """
    found = _SIZE.fullmatch(text.strip().lower())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise ValueError(f"image_size={text!r}: expected width and height in pixels, such as 1280x720")
    return size


def planned_image(name_or_path: str, config: PretrainedConfig, size: tuple[int, int], **options: Any) -> ImageInput:
    """Returns what a model reads of a picture of this size: (width, height) in pixels.

    Args:
        name_or_path: a built-in shape, or a folder or a model on the hub whose processor is read.
        config: of the model.
        options: of `AutoProcessor.from_pretrained`, such as `trust_remote_code`.

    Raises:
        ValueError: the model reads no images, its tower drops their padding, or its processor cannot be read or cannot
            read such a picture.
    """
    if getattr(config, "vision_config", None) is None:
        raise ValueError(f"image_size: {name_or_path!r} ({config.model_type}) reads no images; leave it out")
    if config.model_type in _PADDED_IMAGES:
        raise ValueError(
            f"image_size: {name_or_path!r} ({config.model_type}) has no plan on images, since its tower drops their "
            "padding, which a simulated step does not see; leave image_size out, which plans the run on text alone"
        )
    picture = Image.new("RGB", size)
    if shape_name(name_or_path) is not None:
        settings = IMAGE_PROCESSORS[config.model_type]
        made = Qwen2VLImageProcessorPil(**settings)(images=[picture], return_tensors="pt")
        return ImageInput(dict(made), num_image_embeddings(config, made))
    try:
        return ImageReader(AutoProcessor.from_pretrained(name_or_path, **options)).image_input(picture)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"image_size: the processor of {name_or_path!r} cannot read such images: {error_line(error)}"
        ) from error


def num_image_embeddings(config: PretrainedConfig, tensors: Mapping[str, torch.Tensor]) -> int:
    """Counts the embeddings that a model makes of images, one for each of their tokens, without its weights.

    tensors: what it reads of the images, by the keywords of its forward: pixels float32 (patches, width) or
    (N, 3, H, W), and what else its processor makes.
    """
    with torch.device("meta"):
        model = language_model_class(config).from_config(shortened(config, 1)).eval()
    inner: Any = whole_backbone(model)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker(), torch.no_grad():
        give_fake_memory(model)
        features = inner.get_image_features(**tensors, return_dict=True).pooler_output
    return sum(each.shape[:-1].numel() for each in tree_leaves(features))


class VisionTower:
    """Tells whether a model is reading images: in the forward pass of what stands beside its text model."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def is_reading(self) -> bool:
        """Tells whether a module that reads images is at work."""
        return self._depth > 0

    def watch(self, model: PreTrainedModel) -> None:
        """Puts hooks into the modules that read images."""
        text = backbone(model)
        for module in whole_backbone(model).children():
            if module is not text:
                module.register_forward_pre_hook(lambda *_: self._add(1))
                module.register_forward_hook(lambda *_: self._add(-1))

    def _add(self, change: int) -> None:
        self._depth += change
