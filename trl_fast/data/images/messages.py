"""Puts images into their places in messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ROLES = ("system", "user", "assistant", "tool")
# Names under which a part of a message holds its image.
IMAGE_KEYS = ("image", "url", "path", "base64")


def prepare_multimodal_messages(
    messages: list[dict[str, Any]], images: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """Returns messages whose contents are lists of parts, with the images in their places.

    Text becomes a part of the type text. Where the first message of the user is text, all images come before it. A
    part of the type image that has none yet gets the next one.

    Raises:
        ValueError: a role is unknown, or there are more or fewer images than places.
    """
    waiting, prepared, placed = list(images or ()), [], False
    for message in messages:
        if message["role"] not in _ROLES:
            raise ValueError(
                f"Invalid role in message: {message['role']}. Expected 'system', 'user', 'assistant', or 'tool'."
            )
        content = message.get("content")
        if isinstance(content, str):
            parts: list[dict[str, Any]] = [{"type": "text", "text": content}]
            if message["role"] == "user" and not placed:
                parts, placed = [*({"type": "image"} for _ in waiting), *parts], True
            message = {**message, "content": parts}
        prepared.append(message)
    seen = [message for message in prepared if message.get("content") and message["role"] != "tool"]
    places = sum(_is_place(part) for message in seen for part in message["content"])
    if places != len(waiting):
        raise ValueError(
            f"Number of images provided ({len(waiting)}) does not match number of image placeholders ({places})."
        )
    numbers = iter(waiting)
    filled = {
        id(message): [{**part, "image": next(numbers)} if _is_place(part) else part for part in message["content"]]
        for message in seen
    }
    return [{**message, "content": filled[id(message)]} if id(message) in filled else message for message in prepared]


def _is_place(part: dict[str, Any]) -> bool:
    return part["type"] == "image" and "image" not in part


def clean_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages without keys whose value is None, in parts of contents too, and images under the key `image`.

    A dataset gives every part of a content the keys that one of them has, filled with None. An image may stand under
    `image`, `url`, `path` or `base64`, or in a part `{"type": "image_url", "image_url": {"url": ...}}`.
    """
    return [
        {
            key: _clean_content(value) if key == "content" else value
            for key, value in message.items()
            if value is not None
        }
        for message in messages
    ]


def _clean_content(content: Any) -> Any:
    return [_clean_part(part) for part in content] if isinstance(content, list) else content


def _clean_part(part: dict[str, Any]) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "image_url":
        source = part.get("image_url")
        part = {"type": "image", "image": source.get("url") if isinstance(source, dict) else source}
    if part.get("type") != "image":
        return part
    given = next((part[key] for key in IMAGE_KEYS if key in part), None)
    others = {key: value for key, value in part.items() if key not in IMAGE_KEYS}
    return others if given is None else {**others, "image": given}


def images_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """Returns the images in the parts of messages, in order."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part["image"] for part in parts if part.get("type") == "image" and "image" in part]


def replace_images(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns messages with these images in place of those in the parts (`images_of`), in order."""
    given = iter(images)
    return [
        {**message, "content": [_with_image(part, given) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _with_image(part: dict[str, Any], given: Any) -> dict[str, Any]:
    return {**part, "image": next(given)} if part.get("type") == "image" and "image" in part else part


def strip_images_from_messages(messages: Any) -> Any:
    """Returns messages without the images of their parts, for a log; what is no list comes back as it is."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": [_without_image(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _without_image(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part.get("type") == "image" else part
