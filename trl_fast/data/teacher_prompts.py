"""Prepares what a self-distilled model reads as its own teacher: prompts that tell more than the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .conversation_checks import named_template_errors
from .dataset_types import AnyDataset, map_options
from .prompt_only import tokenize_prompt
from .row_checks import read_columns
from .row_places import place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEACHER_PROMPT_IDS = "teacher_prompt_ids"
PRIVILEGED_CONTEXT = "privileged_context"


def message_text(content: Any) -> str:
    """Returns the text of a message's content: text, or parts of which those of text are joined by blanks."""
    if isinstance(content, list):
        return " ".join(part.get("text") or "" for part in content if part.get("type") == "text")
    return "" if content is None else str(content)


def context_text(context: Any) -> str:
    """Returns what a row tells the teacher as text: text as it is, messages line by line, others as Python says."""
    if isinstance(context, list) and context and isinstance(context[0], Mapping):
        return "\n".join(filter(None, (message_text(message.get("content")) for message in context)))
    return str(context)


def with_last_user_text(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    """Returns a prompt whose text, or the last message's content, is another one."""
    return text if isinstance(prompt, str) else [*prompt[:-1], {"role": "user", "content": text}]


def last_user_text(prompt: str | list[dict[str, Any]], where: str = "prompt") -> str:
    """Returns the text of a prompt, or of the user's message that ends it.

    Raises:
        ValueError: it ends with another message; names the prompt by `where`.
    """
    if isinstance(prompt, str):
        return prompt
    if prompt[-1].get("role") != "user":
        raise ValueError(
            f"{where}: the last message is of {prompt[-1].get('role')!r}; the teacher's "
            "prompt is made of a user's message, so end the prompt with one."
        )
    return message_text(prompt[-1].get("content"))


def _place_of_prompt(name: str, row: int) -> str:
    return f"{place(name, row)}, column 'prompt'"


def check_last_messages(dataset: AnyDataset, name: str = "train") -> None:
    """Checks that each prompt ends with a user's message; of a stream the first one.

    Raises:
        ValueError: one does not; the message names its row.
    """
    rows = dataset.select_columns("prompt") if isinstance(dataset, Dataset) else dataset.take(1)
    for row, example in enumerate(rows):
        if isinstance(example["prompt"], str):  # then all are
            return
        last_user_text(example["prompt"], _place_of_prompt(name, row))


def teacher_prompt(
    example: Mapping[str, Any], template: str, row: int = 0, name: str = "train"
) -> str | list[dict[str, Any]]:
    """Returns the teacher's prompt of a row with `prompt` and `privileged_context`.

    template: with the places {prompt}, the text of the prompt or of its last message, and {privileged_context}.

    Raises:
        ValueError: there is no context, or the prompt ends with another message than a user's.
    """
    prompt, context = example["prompt"], example.get(PRIVILEGED_CONTEXT)
    if context is None:
        raise ValueError(
            f"{place(name, row)}, column {PRIVILEGED_CONTEXT!r}: it is empty, so that the teacher knows no more than "
            "the student; fill it, or remove such rows with dataset.filter(...)."
        )
    text = last_user_text(prompt, _place_of_prompt(name, row))
    told = template.format(prompt=text, privileged_context=context_text(context))
    return with_last_user_text(prompt, told)


def prepare_teacher_prompts(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    template: str,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Returns the dataset with the token ids of the teacher's prompts in `teacher_prompt_ids`.

    The rows' own prompts are prepared before, by `prepare_prompt_dataset`. template: see `teacher_prompt`.
    max_prompt_length: longer prompts lose their beginning.

    Raises:
        ValueError: there is no column `privileged_context`, or as in `teacher_prompt`.
    """
    columns = read_columns(dataset, "at least one prompt", name)
    if TEACHER_PROMPT_IDS in columns:
        return dataset
    if PRIVILEGED_CONTEXT not in columns:
        raise ValueError(
            f"The {name} dataset has the columns {columns}; expected {PRIVILEGED_CONTEXT!r} beside 'prompt': what the "
            "teacher is told, text or messages."
        )
    options = {
        "processing_class": processing_class,
        "template": template,
        "template_kwargs": chat_template_kwargs or {},
        "max_prompt_length": max_prompt_length,
        "name": name,
    }
    how = map_options(dataset, num_proc, f"Tokenizing the teacher's {name} prompts")
    return dataset.map(_tokenize_row, with_indices=True, fn_kwargs=options, **how)


# At module level: datasets pickles it for its worker processes and hashes it for its cache.
def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    template: str,
    template_kwargs: dict[str, Any],
    max_prompt_length: int | None,
    name: str,
) -> dict[str, list[int]]:
    prompt: Any = teacher_prompt(example, template, row, name)
    with named_template_errors({"prompt": prompt}, processing_class, row, name):
        ids = tokenize_prompt(prompt, processing_class, **template_kwargs)
    return {TEACHER_PROMPT_IDS: ids if max_prompt_length is None else ids[-max_prompt_length:]}
