"""Reads the images of rows, and measures those of a split."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..images.columns import fill_images, row_images
from ..images.loading import load_with_mode
from ..images.messages import clean_messages, images_of

PERCENTILES = (0, 50, 100)


class ImageSize(NamedTuple):
    """Holds width and height of an image in pixels, and the mode of its file."""

    width: int
    height: int
    mode: str


@dataclass(frozen=True)
class RecordImages:
    """Holds the images of a row: as they are stored, their sizes, a hash of each one's pixels, and what is wrong."""

    sources: list[Any] = field(default_factory=list)
    sizes: list[ImageSize] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    misplaced: str | None = None


def read_images(example: Mapping[str, Any], columns: Mapping[str, Any]) -> RecordImages:
    """Returns the images of a row, from its columns or the messages of its prompt.

    columns: its prompt and completions.
    """
    prompt = columns["prompt"]
    own = images_of(clean_messages(prompt)) if isinstance(prompt, list) else []
    given = row_images(example)
    found = RecordImages(own or given, misplaced=_misplaced(columns, own, given))
    for index, source in enumerate(found.sources):
        try:
            image, mode = load_with_mode(source)
        except ValueError as error:
            found.failures.append(f"image {index}: {error}")
            continue
        found.sizes.append(ImageSize(*image.size, mode))
        found.digests.append(hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest())
    return found


def _misplaced(columns: Mapping[str, Any], own: list[Any], given: list[Any]) -> str | None:
    if own and given:
        return f"{len(own)} images in the messages and {len(given)} in a column"
    for column, value in columns.items():
        if not isinstance(value, list) or not (own or given or _has_places(value)):
            continue
        try:
            filled = fill_images(value, (own or given) if column == "prompt" else [])
        except ValueError as error:
            return f"{column}: {error}"
        if column != "prompt" and images_of(filled):
            return f"{column}: images belong to the prompt"
    return None


def _has_places(messages: list[dict[str, Any]]) -> bool:
    contents = (message.get("content") for message in clean_messages(messages))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(part.get("type") == "image" for part in parts)


@dataclass
class ImageTable:
    """Holds how many rows of a split have images, and sizes and modes of those images that can be read."""

    rows: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    _sizes: array = field(default_factory=lambda: array("q"))

    def add(self, found: RecordImages) -> None:
        """Enters the images of a row."""
        self.rows += bool(found.sources)
        for size in found.sizes:
            self._sizes.extend(size[:2])
            self.modes[size.mode] += 1

    def __len__(self) -> int:
        return len(self._sizes) // 2

    def facts(self) -> dict[str, Any]:
        """Returns counts, sizes and modes in JSON's types; widths and heights are smallest, median and largest."""
        sizes = np.asarray(self._sizes).reshape(-1, 2)
        measured = {
            name: [int(value) for value in np.percentile(values, PERCENTILES)] if len(values) else []
            for name, values in (("width", sizes[:, 0]), ("height", sizes[:, 1]))
        }
        return {"rows": self.rows, "images": len(self), **measured, "modes": dict(self.modes.most_common())}
