"""Prepares prompts with given completions for methods that sample completions of their own too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .conversation_checks import named_template_errors
from .dataset_types import AnyDataset, map_options
from .images.preparation import map_rows, with_images
from .images.reader import ImageReader
from .images.tokenization import tokenize_with_images
from .prompt_only import PROMPT_IDS
from .question_columns import rename_hint
from .row_checks import check_prompt_and_completion, kind_of, read_columns
from .row_places import place, remove_rows, shorten
from .tokenization import tokenize_unpaired
from .tokenizer_checks import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION_IDS = "completion_ids"


def split_conversations(dataset: AnyDataset, *, num_proc: int | None = None, name: str = "train") -> AnyDataset:
    """Returns a dataset of `messages` with the last one as `completion` and those before it as `prompt`.

    A dataset that has a `prompt`, or no `messages`, comes back as it is.

    Raises:
        ValueError: a conversation is too short, or does not end with the assistant's words.
    """
    row = next(iter(dataset), None) or {}
    if "prompt" in row or "messages" not in row:
        return dataset
    how = map_options(dataset, num_proc, f"Splitting {name} conversations")
    return dataset.map(_split, with_indices=True, fn_kwargs={"name": name}, **how)


def prompts_of_conversations(dataset: AnyDataset, *, num_proc: int | None = None, name: str = "train") -> AnyDataset:
    """Returns a dataset of `messages` with those before the assistant's last words as `prompt`.

    A dataset that has a `prompt`, or no `messages`, comes back as it is.
    """
    row = next(iter(dataset), None) or {}
    if "prompt" in row or "messages" not in row:
        return dataset
    how = map_options(dataset, num_proc, f"Splitting {name} conversations")
    return dataset.map(_prompt_of, **how)


def _prompt_of(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    ends_with_answer = bool(messages) and messages[-1].get("role") == "assistant" and len(messages) > 1
    return {"prompt": messages[:-1] if ends_with_answer else messages}


def prepare_given_completions(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    image_reader: ImageReader | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    tokenize: Callable[..., dict[str, list[int]]] = tokenize_unpaired,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Returns the dataset with the token ids of `prompt` and `completion` in `prompt_ids` and `completion_ids`.

    They are tokenized together. All other columns stay.

    image_reader: as in `prompt_only.prepare_prompt_dataset`. max_length: longer rows lose their prompt's beginning;
    max_prompt_length: longer prompts do.
    tokenize: from a row without images and the tokenizer to both columns.

    Raises:
        ValueError: there are no rows, a column is missing, or a row cannot be used; names the row.
    """
    check_tokenizer(processing_class)
    dataset, image_reader = with_images(dataset, image_reader, num_proc=num_proc, name=name)
    columns = read_columns(dataset, "at least one completion", name, reads_images=image_reader is not None)
    missing = [column for column in ("prompt", "completion") if column not in columns]
    if {PROMPT_IDS, COMPLETION_IDS} <= set(columns):
        return dataset
    if missing:
        raise ValueError(
            f"The {name} dataset has the columns {columns}, but no {missing[0]!r}; where completions are given, "
            f"expected 'prompt' and 'completion', or 'messages'. {rename_hint(columns)}"
        )
    options = {
        "processing_class": processing_class,
        "template_kwargs": chat_template_kwargs or {},
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "tokenize": tokenize,
        "name": name,
    }
    return map_rows(dataset, _tokenize_row, options, image_reader, num_proc, f"Tokenizing {name} dataset")


# They stand at module level: datasets pickles them for its worker processes and hashes them for its cache.


def _split(example: dict[str, Any], row: int, name: str) -> dict[str, Any]:
    messages = example["messages"]
    if kind_of(messages) != "messages" or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place(name, row)}, column 'messages': {shorten(messages)} does not end with an answer; expected "
            "messages of which the last one is the assistant's. Remove such rows."
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    max_length: int | None,
    max_prompt_length: int | None,
    tokenize: Callable[..., dict[str, list[int]]],
    name: str,
    image_reader: ImageReader | None = None,
) -> dict[str, list[int]]:
    check_prompt_and_completion(example, row, name, reads_images=image_reader is not None)
    tools = template_kwargs.get("tools") or example.get("tools")
    row_kwargs = {**template_kwargs, **(example.get("chat_template_kwargs") or {})}
    row_kwargs.pop("tools", None)
    example = {**example, "tools": tools, "chat_template_kwargs": row_kwargs}
    if image_reader is not None:
        prompt_ids, (completion_ids,) = tokenize_with_images(example, ("completion",), image_reader, row, name)
    else:
        with named_template_errors(example, processing_class, row, name):
            prompt_ids, completion_ids = tokenize(example, processing_class).values()
    if not completion_ids:
        raise ValueError(f"{place(name, row)}, column 'completion': it has no tokens. {remove_rows('completion')}")
    left = len(prompt_ids) if max_length is None else max_length - len(completion_ids)
    if not prompt_ids or left < 1:
        limit = "" if max_length is None else f" within max_length={max_length} tokens; raise it"
        raise ValueError(
            f"{place(name, row)}: the prompt has no token left before its completion of {len(completion_ids)} "
            f"tokens{limit}, or remove the row."
        )
    kept = min(left, max_prompt_length or left)
    return {PROMPT_IDS: prompt_ids[-kept:], COMPLETION_IDS: completion_ids}
