"""Small datasets of every kind of rows with images that SFTTrainer takes."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset

from .vision_processors import pictures

_PICTURES = pictures(8)


def _images(i: int) -> list:
    """No image, one or two: rows of text alone are mixed in."""
    return _PICTURES[i % 5 : i % 5 + i % 3]


def _question(i: int, images: int) -> dict:
    parts = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": f"What color is {i}?"}]}


def _answer(i: int) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": f"It is blue {i * 7}" * (1 + i % 3)}]}


def _as_text(message: dict) -> dict:
    return {**message, "content": message["content"][-1]["text"]}


def _turns(i: int) -> list[dict]:
    """A turn for each image, or one."""
    images = len(_images(i))
    return [
        message
        for turn in range(max(images, 1))
        for message in (_question(i + turn, min(images, 1)), _answer(i + turn))
    ]


PICTURE_ROWS: dict[str, Callable[[int], dict]] = {
    "messages": lambda i: {"messages": _turns(i), "images": _images(i)},
    "messages of text": lambda i: {
        "messages": [_as_text(_question(i, 0)), _as_text(_answer(i))],
        "images": _images(i),
    },
    "prompt and completion": lambda i: {
        "prompt": [_as_text(_question(i, 0))],
        "completion": [_as_text(_answer(i))],
        "images": _images(i),
    },
    "one image": lambda i: {"messages": [_as_text(_question(i, 0)), _as_text(_answer(i))], "image": _PICTURES[i % 8]},
}


def picture_rows(kind: str, count: int = 20) -> Dataset:
    """`count` rows of a kind, of different lengths and with no, one or two images."""
    return Dataset.from_list([PICTURE_ROWS[kind](i) for i in range(count)])
