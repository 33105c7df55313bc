"""Finds questions that stand in a column of another name than `prompt`, which training would not see."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from .dataset_types import AnyDataset
from .row_places import place, shorten

logger = logging.getLogger(__name__)

_TRAINED_COLUMNS = ("prompt", "chosen", "completion", "messages", "conversations", "text")
# What published preference data calls its prompts.
QUESTION_COLUMNS = ("question", "instruction", "query", "problem", "input", "user_prompt", "prompt_text")


def rename_hint(columns: Iterable[str]) -> str:
    """Tells how to give a dataset its `prompt`, for the end of a message."""
    known = [*columns]
    found = [column for column in QUESTION_COLUMNS if column in known]
    if not found or "prompt" in known:
        return "Rename yours: in the file, or with dataset.rename_column(...)."
    return f"If {found[0]!r} is the prompt, call dataset.rename_column({found[0]!r}, 'prompt')."


def check_no_question_is_left_out(example: dict[str, Any], row: int, name: str = "train") -> None:
    """Checks that a preference row without `prompt` has no question beside its completions that these do not repeat.

    Without a `prompt`, it is what `chosen` and `rejected` begin with. That is how data with whole conversations works;
    where they hold the response alone, a question in another column would never reach the model.

    Raises ValueError that names the columns.
    """
    unseen = unseen_questions(example, ("chosen", "rejected"))
    if "prompt" in example or not unseen:
        return
    column = unseen[0]
    raise ValueError(
        f"{place(name, row)}: there is no 'prompt', and 'chosen' and 'rejected' do not hold the text of "
        f"{', '.join(map(repr, unseen))} ({column}: {shorten(example[column])}), so the model would not see it. Call "
        f"dataset.rename_column({column!r}, 'prompt'), or dataset.remove_columns({unseen!r}) if it is no prompt."
    )


def unseen_questions(example: dict[str, Any], columns: Iterable[str]) -> list[str]:
    """Returns a row's columns of questions, if none of them is repeated in all of the `columns`."""
    asked = {column: _text(example[column]) for column in QUESTION_COLUMNS if column in example}
    asked = {column: text for column, text in asked.items() if text}
    seen = [_text(example[column]) for column in columns] if asked else []
    return [] if any(all(text in side for side in seen) for text in asked.values()) else [*asked]


def warn_of_system_column(dataset: AnyDataset, columns: Iterable[str], name: str) -> None:
    """Says so if a dataset's first row has a text in the column `system` that none of the texts trained on holds."""
    known = {*columns}
    if "system" not in known or known & {"input_ids", "prompt_ids", "chosen_ids"}:
        return
    row = next(iter(dataset))
    texts = [_text(row[column]) for column in _TRAINED_COLUMNS if column in row]
    system = _text(row.get("system"))
    if texts and system and not any(system in text for text in texts):
        logger.warning(
            f"The {name} dataset: the column 'system' ({shorten(row['system'])}) is not read, and the model does not "
            "see it. If it belongs to the data, begin the messages with {'role': 'system', 'content': ...}; if not, "
            "remove the column."
        )


def _text(value: Any) -> str:
    """Returns a text, or the texts of messages, without runs of white space and differences in case; else ""."""
    if isinstance(value, list):
        messages = [message for message in value if isinstance(message, dict)]
        contents = [message.get("content", message.get("value")) for message in messages]
        value = " ".join(content for content in contents if isinstance(content, str))
    return " ".join(value.split()).casefold() if isinstance(value, str) else ""
