"""Prepares prompts for methods that sample their own completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attention_masks import strip_padding
from .conversation_checks import named_template_errors
from .dataset_types import AnyDataset, map_options
from .formats import is_conversational
from .images.length_checks import check_row_images
from .images.preparation import map_rows, with_images
from .images.reader import ImageReader
from .images.tokenization import tokenize_prompt_with_images
from .question_columns import rename_hint
from .row_checks import check_prompt, read_columns
from .row_places import place
from .tokenizer_checks import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_IDS = "prompt_ids"


def tokenize_prompt(
    prompt: str | list[dict], processing_class: PreTrainedTokenizerBase, **template_kwargs: Any
) -> list[int]:
    """Returns a prompt's token ids: messages through the chat template, open for the answer; text as it is."""
    if is_conversational({"prompt": prompt}):
        messages: Any = prompt
        output: Any = processing_class.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, **template_kwargs
        )
        return output["input_ids"]
    return processing_class(text=prompt)["input_ids"]


def prepare_prompt_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    image_reader: ImageReader | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Returns the dataset with the token ids of its column `prompt` in `prompt_ids`; all other columns stay.

    image_reader: reads images, those of the columns `images` (lists) or `image`, or in the messages; they stay in the
        dataset as they are stored.
    max_prompt_length: longer prompts lose their beginning.

    Raises:
        ValueError: there are no rows, no column `prompt`, images that nothing reads, an image that is broken or would
            be cut, or a prompt that is empty, of another type, or has no tokens.
    """
    check_tokenizer(processing_class)
    dataset, image_reader = with_images(dataset, image_reader, num_proc=num_proc, name=name)
    columns = read_columns(dataset, "at least one prompt", name, reads_images=image_reader is not None)
    if "prompt" not in columns:
        raise ValueError(
            f"The {name} dataset has the columns {columns}; expected 'prompt', a string or a list of messages. "
            + rename_hint(columns)
        )
    if PROMPT_IDS in columns:
        return dataset
    options = {
        "processing_class": processing_class,
        "template_kwargs": chat_template_kwargs or {},
        "max_prompt_length": max_prompt_length,
        "name": name,
    }
    return map_rows(dataset, _tokenize_row, options, image_reader, num_proc, f"Tokenizing {name} prompts")


def prompts_of_tokens(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Returns the dataset with its column `input_ids` in `prompt_ids`, without padding, and as text in `prompt`.

    What has no `input_ids`, or has `prompt_ids` already, comes back as it is.

    Raises:
        ValueError: a row has no tokens.
    """
    row = next(iter(dataset), None) or {}
    if "input_ids" not in row or PROMPT_IDS in row:
        return dataset
    dataset = strip_padding(dataset, ("input_ids",), num_proc=num_proc, name=name)
    how = map_options(dataset, num_proc, f"Reading {name} prompts")
    options = {"processing_class": processing_class, "name": name}
    return dataset.map(_without_padding, with_indices=True, fn_kwargs=options, **how)


# They stand at module level: datasets pickles them for its worker processes and hashes them for its cache.


def _without_padding(
    example: dict[str, Any], row: int, processing_class: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    ids = list(example["input_ids"])
    # Those are no part of a prompt to TRL either, wherever they stand.
    first = next((index for index, token in enumerate(ids) if token != processing_class.pad_token_id), len(ids))
    last = next((index for index in reversed(range(len(ids))) if ids[index] != processing_class.pad_token_id), -1)
    ids = ids[first : last + 1]
    if not ids:
        raise ValueError(f"{place(name, row)}, column 'input_ids': the prompt has no tokens; fill or remove it.")
    text = example.get("prompt") or processing_class.decode(ids, skip_special_tokens=True)
    return {"prompt": text, PROMPT_IDS: ids}


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    max_prompt_length: int | None,
    name: str,
    image_reader: ImageReader | None = None,
) -> dict[str, list[int]]:
    prompt = example["prompt"]
    check_prompt(prompt, row, name, reads_images=image_reader is not None)
    if isinstance(prompt, str) and template_kwargs.get("tools"):
        raise ValueError(
            f"{place(name, row)}, column 'prompt': {prompt!r} is text, which has no place for tools; "
            "expected a list of messages such as {'role': 'user', 'content': 'Hello.'}."
        )
    if image_reader is not None:
        ids = tokenize_prompt_with_images(example, image_reader, row, name, **template_kwargs)
        check_row_images(ids, image_reader.image_token_id, row, name, max_prompt_length=max_prompt_length)
    else:
        with named_template_errors({"prompt": prompt}, processing_class, row, name):
            ids = tokenize_prompt(prompt, processing_class, **template_kwargs)
    if not ids:
        raise ValueError(f"{place(name, row)}, column 'prompt': the prompt has no tokens; fill or remove it.")
    return {PROMPT_IDS: ids if max_prompt_length is None else ids[-max_prompt_length:]}
