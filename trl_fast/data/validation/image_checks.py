"""Checks the images of rows."""

from __future__ import annotations

from typing import Any

from ..images.reader import ImageReader
from ..images.tokenization import tokenize_with_images
from .findings import Hits, Kind
from .preference_record import Context, Record, TokenIds

BROKEN_IMAGE = Kind(
    "broken_image", "error", "image cannot be read", "Replace the image or remove the row; training refuses such rows."
)
MISPLACED_IMAGES = Kind(
    "misplaced_images",
    "error",
    "images and their places do not fit",
    "Give each image of the prompt one place, and each place one image; training refuses such rows.",
)
CUT_IMAGE = Kind(
    "image_cut_at_max_length",
    "error",
    "max_length cuts an image",
    "Raise max_length, or make the images smaller; training refuses such rows.",
)


def image_token_ids(record: Record, reader: ImageReader) -> TokenIds | None:
    """Returns the ids of a record with those of its images; None where other findings say why there are none."""
    images = record.images
    if images.failures or images.misplaced or not all(record.completions.values()):
        return None
    options = dict(record.template_options)
    tools = options.pop("tools", None)
    example: dict[str, Any] = {"prompt": record.prompt, **record.completions, "images": images.sources}
    example |= {"tools": tools, "chat_template_kwargs": options}
    try:
        prompt, completions = tokenize_with_images(example, tuple(record.completions), reader, record.row, "train")
    # A template is a program of its author's and raises what it likes.
    except Exception as error:
        return TokenIds(failure=f"{type(error).__name__}: {error}")
    return TokenIds(prompt, dict(zip(record.completions, completions, strict=True)), len(prompt))


def images(record: Record, context: Context) -> Hits:
    """Finds images that cannot be read, that do not fit their places, and that max_length cuts."""
    yield from ((BROKEN_IMAGE, failure) for failure in record.images.failures)
    if record.images.misplaced:
        yield MISPLACED_IMAGES, record.images.misplaced
    tokens, reader = record.tokens, context.image_reader
    if tokens is None or reader is None or context.max_length is None:
        return
    cut = tokens.prompt[context.max_length :].count(reader.image_token_id)
    if cut:
        yield CUT_IMAGE, f"{cut} of {tokens.prompt.count(reader.image_token_id)} image tokens cut"


IMAGE_CHECKS = (images,)
