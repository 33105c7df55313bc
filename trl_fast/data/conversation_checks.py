"""Checks messages and texts of rows, and names the row where a chat template fails.

Every error names the dataset and row, the column, the message, and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from .row_places import place, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The beginning of messages that were written as JSON, or as Python prints them.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
# Types of parts that hold an image, or mark its place.
_IMAGE_PARTS = ("image", "image_url")
_PROBE = "probe_7c1e"
# What chat templates raise on messages that they do not expect.
_TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, AttributeError)


def check_content(value: str | list[Any], column: str, row: int, name: str, *, reads_images: bool = False) -> None:
    """Checks a text by `check_text`, messages by `check_messages`."""
    if isinstance(value, str):
        check_text(value, column, row, name)
    else:
        check_messages(value, column, row, name, reads_images=reads_images)


def check_text(text: str, column: str, row: int, name: str) -> None:
    """Checks that a text is not a list of messages, written as JSON or as Python prints it.

    Raises ValueError otherwise.
    """
    found = _MESSAGES_AS_TEXT.match(text)
    if found is None:
        return
    written, read = ("JSON", "json.loads") if found[1] == '"' else ("Python", "ast.literal_eval")
    raise ValueError(
        f"{place(name, row)}, column {column!r}: {shorten(text)} is text that holds messages, written as {written}; "
        f"read it first: dataset.map(lambda row: {{{column!r}: {read}(row[{column!r}])}})."
    )


def check_messages(messages: list[Any], column: str, row: int, name: str, *, reads_images: bool = False) -> None:
    """Checks that each message has a role and a content: text, parts with a type, or None where it has something else.

    Messages with `from` and `value` instead are taken too, and parts with images where there is a processor for them.

    Raises ValueError otherwise.
    """
    for index, message in enumerate(messages):
        role = message.get("role", message.get("from"))
        wrong = None
        if not isinstance(role, str):
            wrong = f"the role is {shorten(role)}; expected text such as 'user'"
        else:
            wrong = _wrong_content(message, reads_images)
        if wrong is not None:
            raise ValueError(f"{place(name, row)}, column {column!r}, message {index}: {wrong}.")


def _wrong_content(message: dict[str, Any], reads_images: bool) -> str | None:
    """Returns what is wrong with a message's content and what to do; None if nothing is."""
    content = message.get("content", message.get("value"))
    expected = "expected text; fill it, or remove such rows with dataset.filter(...)"
    if isinstance(content, str):
        return None
    if content is None:
        said = [key for key, value in message.items() if value and key not in ("role", "from", "content", "value")]
        return None if said else f"the content of the {message.get('role')!r} message is missing; {expected}"
    if not isinstance(content, list):
        return f"the content {shorten(content)} is of type {type(content).__name__}; {expected}"
    for part in content:
        if not isinstance(part, dict) or "type" not in part:
            return f"the part {shorten(part)} of the content has no type; expected {{'type': 'text', 'text': ...}}"
        if part["type"] in _IMAGE_PARTS:
            if reads_images:
                continue
            return (
                f"the content has a part of type {part['type']!r}, which needs an image, in the part or in a column "
                "'images', and a model's processor as processing_class; or remove the row"
            )
        if part["type"] != "text":
            return f"the content has a part of type {part['type']!r}; it is not supported, so remove the row"
        if not isinstance(part.get("text"), str):
            return f"the part {shorten(part)} of the content has no text; {expected}"
    return None


@contextmanager
def named_template_errors(
    example: dict[str, Any], processing_class: PreTrainedTokenizerBase, row: int, name: str
) -> Iterator[None]:
    """Names the row, column and message where the chat template fails while it is open.

    Contents in parts are refused before, where the template would write the list itself instead of its texts. Other
    errors of the row, of its tools for instance, get its number.

    Raises ValueError for all of them.
    """
    for column, index in _places_of_parts(example):
        if not _reads_parts(processing_class):
            raise ValueError(
                f"{place(name, row)}, column {column!r}, message {index}: the content is a list of parts, which the "
                "tokenizer's chat template does not read; join the texts of the parts to one."
            )
    try:
        with named_row_errors(row, name):
            yield
    except ValueError as error:
        if processing_class.chat_template is None and "chat_template" in str(error):
            remedy = "the row has messages, but the tokenizer has no chat template; set processing_class.chat_template"
            raise ValueError(f"{place(name, row)}: {remedy}") from error
        raise


@contextmanager
def named_row_errors(row: int, name: str) -> Iterator[None]:
    """Names the row where a chat template or what reads its text fails while it is open.

    Raises ValueError for all of them.
    """
    try:
        yield
    except _TEMPLATE_ERRORS as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)
        raise ValueError(f"{place(name, row)}: the chat template refuses the messages: {what}") from error
    except ValueError as error:
        raise ValueError(f"{place(name, row)}: {error}") from error


def _places_of_parts(example: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields the column and number of each message whose content is a list."""
    for column, messages in example.items():
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict) and isinstance(message.get("content"), list):
                yield column, index


def _reads_parts(processing_class: PreTrainedTokenizerBase) -> bool:
    """Says whether the chat template writes the texts of a content in parts, and not the list."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
    try:
        text: Any = processing_class.apply_chat_template(messages, tokenize=False)
    except _TEMPLATE_ERRORS:
        return False
    return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text
