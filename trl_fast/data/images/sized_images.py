"""Spares the making of pixels where only the token ids of images are wanted."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Sizes whose pixels are kept: a dataset's images often have few, and pixels of a large one are 10 MB.
_SIZES = 16


class SizedImageProcessor:
    """Answers as an image processor does, but makes images of a known size only once: pixels are those of the first.

    How many tokens stand for an image, and between which marks, depends on its size alone.
    """

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._made: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        """Returns what the image processor makes of images of these sizes; images: one, or nested lists of them."""
        key = (_sizes(images), repr(args), repr(sorted(options.items())))
        if key not in self._made:
            self._made[key] = self._image_processor(images, *args, **options)
            if len(self._made) > _SIZES:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return copy.copy(self._made[key])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_image_processor":
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the pixels out of copies, and out of the key of a dataset's cache."""
        return {"_image_processor": self._image_processor, "_made": OrderedDict()}


def with_sized_images(processor: ProcessorMixin) -> ProcessorMixin:
    """Returns a copy of a processor whose token ids are right and whose pixels are not."""
    made = copy.copy(processor)
    made.image_processor = SizedImageProcessor(processor.image_processor)
    return made


def _sizes(images: Any) -> Any:
    return tuple(map(_sizes, images)) if isinstance(images, (list, tuple)) else images.size
