"""Dataset formats: from rows of text or messages to token ids."""

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .checks import (
    TOKEN_COLUMNS,
    check_completions,
    check_not_emptied,
    check_preference_columns,
    check_preference_row,
    check_tokenizer,
)
from .dataset_types import AnyDataset, map_options
from .token_trees import TRUNCATION_MODES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")

# Part of the cache's key: datasets hashes a module's function by its name, not by its code. Count it up whenever rows
# come out differently.
FORMAT_VERSION = 1

_warned_of_prompt_tail = False


def is_conversational(example: dict[str, Any]) -> bool:
    """Whether one of the row's text columns is a list of messages, dicts with at least a `role`."""
    values = (example[column] for column in MESSAGE_COLUMNS if column in example)
    return any(
        isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict) and "role" in value[0]
        for value in values
    )


def extract_prompt(example: dict[str, Sequence]) -> dict[str, Sequence]:
    """Split the part that `chosen` and `rejected` begin with off as `prompt`; both text or both lists of messages.

    A space before the first difference goes to the completions. If one of the two is a prefix of the other, its last
    element (character or message) stays a completion, so that none becomes empty.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shorter = min(len(chosen), len(rejected))
    split = next((index for index in range(shorter) if chosen[index] != rejected[index]), None)
    if split is None:
        split = max(shorter - 1, 0)
    elif split > 0 and chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def maybe_extract_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """`extract_prompt` for rows without a prompt of the same kind as their completions; other rows as they are.

    Some datasets repeat the question as a text `prompt` beside completions that are whole conversations: there, the
    prompt is taken from the conversations.
    """
    if "chosen" not in example or "rejected" not in example:
        return example
    if "prompt" in example:
        same_kind = is_conversational({"prompt": example["prompt"]}) == is_conversational(
            {"chosen": example["chosen"]}
        )
        if same_kind:
            return example
    return extract_prompt({"chosen": example["chosen"], "rejected": example["rejected"]})


def tokenize_preference(example: dict[str, Any], processing_class: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Token ids of a row with `prompt`, `chosen` and `rejected`: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Messages go through the chat template, with the row's `tools` (a list, or one as JSON) and `chat_template_kwargs`.
    Text gets the tokenizer's default special tokens, and completions the EOS token if they do not end with it.

    Prompt and completion are tokenized together, because tokens may merge where they meet. The completion starts
    where prompt + chosen or prompt + rejected first departs from the prompt's own tokens; the end of the prompt after
    that place is left out, with one warning a process.
    """
    prompt_ids, (chosen, rejected) = _tokenize_parts(example, ("chosen", "rejected"), processing_class)
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def tokenize_unpaired(example: dict[str, Any], processing_class: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """`tokenize_preference` for a row with `prompt` and one `completion`: `prompt_ids` and `completion_ids`."""
    prompt_ids, (completion,) = _tokenize_parts(example, ("completion",), processing_class)
    return {"prompt_ids": prompt_ids, "completion_ids": completion}


def _tokenize_parts(
    example: dict[str, Any], columns: tuple[str, ...], processing_class: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of the completion in each of the columns."""
    if is_conversational(example):
        tools = example.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(example.get("chat_template_kwargs") or {}),
        }
        prompt_ids = _template_ids(processing_class, example["prompt"], add_generation_prompt=True, **options)
        full = [_template_ids(processing_class, example["prompt"] + example[column], **options) for column in columns]
    else:
        eos_token = processing_class.eos_token
        prompt_ids = processing_class(text=example["prompt"])["input_ids"]
        full = [
            processing_class(text=example["prompt"] + end_with(example[column], eos_token))["input_ids"]
            for column in columns
        ]
    start = min(common_prefix_length(prompt_ids, ids) for ids in full)
    if start < len(prompt_ids):
        warn_of_prompt_tail(processing_class.decode(prompt_ids[start:]))
    return prompt_ids[:start], [ids[start:] for ids in full]


def common_prefix_length(ids: list[int], other_ids: list[int]) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(ids), len(other_ids))
    return next((index for index in range(shorter) if ids[index] != other_ids[index]), shorter)


def _template_ids(processing_class: "PreTrainedTokenizerBase", messages: list[dict], **options: Any) -> list[int]:
    return processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def end_with(text: str, ending: str) -> str:
    """The text, with the ending put behind it if it does not end so."""
    return text if text.endswith(ending) else text + ending


def warn_of_prompt_tail(tail: str) -> None:
    """Says once a process that a prompt's end is left out."""
    global _warned_of_prompt_tail
    if not _warned_of_prompt_tail:
        _warned_of_prompt_tail = True
        logger.warning(
            f"A prompt, tokenized alone, ends with {tail!r}, which the prompt followed by its completion does not "
            "have there: the chat template renders the two differently, or tokens merge where they meet. The "
            "completion starts at the first difference and this end of the prompt is left out, so the model is "
            "trained on another context than it will see. Other rows may be affected; this is said once."
        )


def prepare_preference_dataset(
    dataset: AnyDataset,
    processing_class: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Check a preference dataset, tokenize it, and drop the rows that truncation would leave without a completion.

    Rows have `chosen` and `rejected`, `prompt` or not, as text or as messages; the answer has the columns
    `prompt_ids`, `chosen_ids` and `rejected_ids` (int64 lists) beside the dataset's own. A dataset that has the three
    already is not tokenized again. Where the prompt was implicit, the text columns are split too.

    With `keep_start`, rows whose prompt fills `max_length` are dropped; the rest is cut when a batch is made.
    `max_prompt_length` and `max_completion_length` are older limits, in tokens: a longer prompt loses its beginning,
    a longer completion its end, before anything else is cut. Streams are tokenized and checked row by row as they are
    read. `num_proc` processes work on a Dataset.

    Raises ValueError for bad data (see `checks`), naming the dataset `name` and the row.
    """
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(
            f"truncation_mode={truncation_mode!r} is unknown; expected one of {', '.join(TRUNCATION_MODES)}."
        )
    columns = check_preference_columns(dataset, name)
    check_tokenizer(processing_class)
    if not set(TOKEN_COLUMNS) <= set(columns):
        arguments = {"processing_class": processing_class, "name": name, "format_version": FORMAT_VERSION}
        options = map_options(dataset, num_proc, f"Tokenizing {name} dataset")
        dataset = dataset.map(_tokenize_row, with_indices=True, fn_kwargs=arguments, **options)
    completions = TOKEN_COLUMNS[1:]
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    dataset = cut_parts(dataset, completions, **limits, num_proc=num_proc, name=name)
    if isinstance(dataset, Dataset):
        check_completions(dataset, name)
    if max_length is not None and truncation_mode == "keep_start":
        dataset = drop_without_room(dataset, max_length, num_proc, name)
    return dataset


def cut_parts(
    dataset: AnyDataset,
    completions: tuple[str, ...],
    *,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    num_proc: int | None,
    name: str,
) -> AnyDataset:
    """The dataset with the beginnings of longer prompts cut off, and the ends of longer ids in `completions`."""
    if max_prompt_length is not None:
        options = map_options(dataset, num_proc, f"Truncating prompts of {name} dataset")
        dataset = dataset.map(_keep_prompt_end, fn_kwargs={"max_prompt_length": max_prompt_length}, **options)
    if max_completion_length is not None:
        options = map_options(dataset, num_proc, f"Truncating completions of {name} dataset")
        arguments = {"max_completion_length": max_completion_length, "columns": completions}
        dataset = dataset.map(_keep_completion_start, fn_kwargs=arguments, **options)
    return dataset


def drop_without_room(dataset: AnyDataset, max_length: int, num_proc: int | None, name: str) -> AnyDataset:
    """The rows whose prompt leaves room for a completion in `max_length` tokens.

    Raises ValueError if there are none.
    """
    options = map_options(dataset, num_proc, f"Dropping fully truncated rows of {name} dataset")
    dataset = dataset.filter(_prompt_leaves_room, fn_kwargs={"max_length": max_length}, **options)
    if isinstance(dataset, Dataset):
        check_not_emptied(dataset, max_length, name)
    return dataset


# The functions given to `map` and `filter` stand at module level: datasets pickles them for its worker processes and
# hashes them for its cache.


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: "PreTrainedTokenizerBase",
    name: str,
    format_version: int,
) -> dict[str, Any]:
    check_preference_row(example, row, name)
    split = maybe_extract_prompt(example)
    changed_columns = {} if split is example else split
    split = {**example, **changed_columns}
    conversational = is_conversational(split)
    if conversational and len(split["prompt"]) == 0:
        raise ValueError(
            f"The {name} dataset, row {row}: 'chosen' and 'rejected' have no leading message in common, so there is "
            "no prompt. Add a 'prompt' column with the messages before the completions."
        )
    check_tokenizer(processing_class, needs_eos=not conversational)
    token_ids = tokenize_preference(split, processing_class)
    for column in ("chosen_ids", "rejected_ids"):
        if not token_ids[column]:
            raise ValueError(
                f"The {name} dataset, row {row}, column {column!r}: the completion has no tokens after tokenization. "
                "Fill it, or remove the row."
            )
    return {**changed_columns, **token_ids}


def _keep_prompt_end(example: dict[str, Any], max_prompt_length: int) -> dict[str, list[int]]:
    prompt_ids = example["prompt_ids"]
    return {"prompt_ids": prompt_ids[max(len(prompt_ids) - max_prompt_length, 0) :]}


def _keep_completion_start(
    example: dict[str, Any], max_completion_length: int, columns: tuple[str, ...]
) -> dict[str, list[int]]:
    return {column: example[column][:max_completion_length] for column in columns}


def _prompt_leaves_room(example: dict[str, Any], max_length: int) -> bool:
    return len(example["prompt_ids"]) < max_length
