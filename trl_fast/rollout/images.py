"""Holds the images of rollouts: as users and vLLM see them, and as a model reads them, each different one once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from trl_fast.data.formats import is_conversational
from trl_fast.data.images.columns import IMAGE_COLUMNS, IMAGES, fill_images, row_images
from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.joining import join_images
from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.images.loading import load_image
from trl_fast.data.images.messages import images_of
from trl_fast.data.images.reader import ImageReader


@dataclass(frozen=True, eq=False)
class RolloutImage:
    """Holds an image of a prompt, or of a tool's result.

    - `picture`: in RGB.
    - `inputs`: what the model reads of it.
    - `digest`: a text that equal pictures have in common.
    """

    picture: Image.Image
    inputs: ImageInput
    digest: str


# The images of each prompt, in the order of their tokens.
PromptImages = list[tuple[RolloutImage, ...]]


class RolloutImages:
    """Reads the images of prompts and tools' results for a model, each different one once a generation.

    Args:
        reader: of the model's processor.
    """

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader
        self._known: dict[str, RolloutImage] = {}

    def forget(self) -> None:
        """Forgets what was read: the next generation has other images."""
        self._known.clear()

    def of_prompts(self, prompts: Sequence[Any]) -> PromptImages | None:
        """Returns the images in the parts of the prompts' messages; None where no prompt has any."""
        found = [self.of_messages(prompt) if is_conversational({"prompt": prompt}) else () for prompt in prompts]
        return found if any(found) else None

    def of_messages(self, messages: Sequence[dict[str, Any]]) -> tuple[RolloutImage, ...]:
        """Returns the images in the parts of messages, in order.

        Raises:
            ValueError: one cannot be read.
        """
        return tuple(self.read(source) for source in images_of(messages))

    def read(self, source: Any) -> RolloutImage:
        """Returns an image, given in any way that `load_image` takes.

        Raises:
            ValueError: it cannot be read.
        """
        picture = load_image(source)
        digest = _digest(picture)
        if digest not in self._known:
            self._known[digest] = RolloutImage(picture, self.reader.image_input(picture), digest)
        return self._known[digest]


def with_images_in_messages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with the images of their columns in the parts of their prompts' messages, as in TRL.

    Contents become lists of parts then. Where no row has an image, all rows stay as they are.

    Raises:
        ValueError: there are more or fewer images than places, or one cannot be read.
    """
    column = next((name for name in IMAGE_COLUMNS if name in rows[0]), None)
    if column is None or all(row[column] == [] for row in rows):
        return rows
    found: list[dict[str, Any]] = []
    before: tuple[Any, list[Image.Image]] = (None, [])
    for row in rows:
        # A group has the same row again and again.
        pictures = before[1] if row[column] == before[0] else [_opened(each) for each in row_images(row)]
        before = (row[column], pictures)
        shown = {column: pictures if column == IMAGES else pictures[0]} if pictures else {}
        found.append({**row, **shown, "prompt": fill_images(row["prompt"], pictures)})
    return found


def _opened(source: Any) -> Image.Image:
    return source if isinstance(source, Image.Image) else load_image(source)


def _digest(picture: Image.Image) -> str:
    shape = f"{picture.mode} {picture.size}".encode()
    return hashlib.blake2b(picture.tobytes(), key=shape, digest_size=16).hexdigest()


def image_keywords(
    images: Sequence[Sequence[ImageInput]], layout: ImageLayout, input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the keywords by which a model's forward takes the images of prompts; none where there are no images.

    Args:
        images: of each of B prompts, in the order of their tokens.
        layout: how the model wants to have images.
        input_ids: the prompts, (B, T) int64, padded anywhere.

    Returns:
        Tensors on the device of `input_ids`: those of the images, joined in order, and types of tokens (B, T).
    """
    every = [image for own in images for image in own]
    if not every:
        return {}
    marked = layout.marked_tokens(input_ids, [input_ids.shape[1] if own else 0 for own in images])
    joined = {name: tensor.to(input_ids.device) for name, tensor in join_images(every).items()}
    return joined | layout.types_of(marked)
