"""Finds the images of datasets' rows, in columns and in messages, and puts them into their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from PIL.Image import Image

from trl_fast.data.added_columns import add_columns
from trl_fast.data.dataset_types import AnyDataset
from trl_fast.data.formats import MESSAGE_COLUMNS, maybe_extract_prompt
from trl_fast.data.row_places import place, shorten

from .loading import load_image
from .messages import IMAGE_KEYS, clean_messages, images_of, prepare_multimodal_messages, replace_images

IMAGES, ONE_IMAGE = "images", "image"
IMAGE_COLUMNS = (IMAGES, ONE_IMAGE)
_CONVERSATIONS = (*MESSAGE_COLUMNS, "conversations")
_COMPLETIONS = ("chosen", "rejected", "completion")


def has_images(dataset: AnyDataset) -> bool:
    """Says whether rows have images: in a column `images` or `image`, or in parts of messages.

    A stream that does not know its columns is told by its first row.
    """
    columns = dataset.column_names or list(next(iter(dataset.with_format(None)), {}))
    return any(column in columns for column in IMAGE_COLUMNS) or _in_messages(dataset)


def _in_messages(dataset: AnyDataset) -> bool:
    """Says whether parts of messages hold images, by the dataset's features and its first row."""
    known: list[Mapping[str, Any]] = [dataset.features or {}, next(iter(dataset.with_format(None)), {})]
    return any(_holds_image(columns.get(column)) for columns in known for column in _CONVERSATIONS)


def _holds_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        if "type" in value and any(value.get(key) is not None for key in (*IMAGE_KEYS, "image_url")):
            return True
        return any(map(_holds_image, value.values()))
    if isinstance(value, List):
        return _holds_image(value.feature)
    return isinstance(value, (list, tuple)) and any(map(_holds_image, value))


def with_encoded_images(dataset: AnyDataset) -> AnyDataset:
    """Returns a dataset whose rows hold images as they are stored, bytes or path, not decoded; nothing is copied.

    Images that the dataset has in a mode of their own, such as grey ones, stay decoded: a stored one does not tell it.
    """
    features = dataset.features
    if features is None:
        return dataset
    encoded = Features({column: _encoded(feature) for column, feature in features.items()})
    if encoded == features:
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.decode(False)
    info = dataset.info.copy()
    info.features = encoded
    made = Dataset(
        dataset.data,
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,
        fingerprint=Hasher.hash((dataset._fingerprint, "encoded images")),
    )
    form = dataset.format
    return made.with_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])


def _encoded(feature: Any) -> Any:
    if isinstance(feature, ImageFeature):
        if feature.mode not in (None, "RGB"):
            return feature
        return ImageFeature(mode=feature.mode, decode=False)
    if isinstance(feature, List):
        return List(_encoded(feature.feature), length=feature.length)
    return {name: _encoded(each) for name, each in feature.items()} if isinstance(feature, dict) else feature


def gather_images(dataset: AnyDataset, *, num_proc: int | None, name: str) -> AnyDataset:
    """Returns a dataset with images in parts of messages with these in a column `images` too, in order.

    Others come back as they are.

    Raises:
        ValueError: a row has images in its messages and in a column, or in a completion.
    """
    if not _in_messages(dataset):
        return dataset
    features = Features({IMAGES: List(ImageFeature(decode=False))}) if isinstance(dataset, Dataset) else None
    desc = f"Gathering images of {name} dataset"
    return add_columns(dataset, _gathered, num_proc=num_proc, desc=desc, features=features, fn_kwargs={"name": name})


def _gathered(example: dict[str, Any], row: int, name: str) -> dict[str, Any]:
    split = {**example, **maybe_extract_prompt(dict(example))}
    given = row_images(example, row, name)
    found: list[Any] = []
    for column in _CONVERSATIONS:
        messages = split.get(column)
        own = images_of(clean_messages(messages)) if isinstance(messages, list) else []
        if own and column in _COMPLETIONS:
            raise ValueError(
                f"{place(name, row)}, column {column!r}: a completion has an image; images belong to the prompt."
            )
        found += own
    if found and given:
        raise ValueError(
            f"{place(name, row)}: there are {len(found)} images in the messages and {len(given)} in a column; put all "
            "of them into one of the two."
        )
    return {IMAGES: [_stored(source) for source in found or given]}


def _stored(source: Any) -> Any:
    """Returns an image as `datasets.Image` stores it: a column cannot hold paths, bytes and dicts of them at once."""
    if isinstance(source, str):
        return {"bytes": None, "path": source}
    return {"bytes": source, "path": None} if isinstance(source, bytes) else source


def row_images(example: Mapping[str, Any], row: int | None = None, name: str = "train") -> list[Any]:
    """Returns what a row holds of its images, in the order of their places: its column `images`, or the one `image`.

    Raises:
        ValueError: `images` is no list, `image` is one, or one of the images is missing.
    """
    column = IMAGES if IMAGES in example else ONE_IMAGE
    value = example.get(column)
    if value is None:
        return []
    if isinstance(value, (list, tuple)) != (column == IMAGES):
        expected = "a list of images" if column == IMAGES else "one image, or the name 'images' for a list"
        raise ValueError(f"{_where(row, name)}, column {column!r}: {shorten(value)}; expected {expected}.")
    return list(value) if column == IMAGES else [value]


def load_images(example: Mapping[str, Any], row: int | None = None, name: str = "train") -> list[Image]:
    """Returns the images of a row as `loading.load_image` does; row: its number, for errors.

    Raises:
        ValueError: one of them is broken; the message names dataset, row and image.
    """
    loaded = []
    for index, source in enumerate(row_images(example, row, name)):
        try:
            loaded.append(load_image(source))
        except ValueError as error:
            raise ValueError(f"{_where(row, name)}, image {index}: {error}.") from error
    return loaded


def fill_images(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns messages in parts with a row's images in their places, also where they had images of their own.

    Raises:
        ValueError: there are more or fewer images than places.
    """
    cleaned = clean_messages(messages)
    if not images_of(cleaned):
        return prepare_multimodal_messages(cleaned, images)
    return replace_images(prepare_multimodal_messages(cleaned), images)


def _where(row: int | None, name: str) -> str:
    return f"A row of the {name} dataset" if row is None else place(name, row)
