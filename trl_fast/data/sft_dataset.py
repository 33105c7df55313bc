"""Prepares datasets for supervised fine-tuning: rows of text or messages become token ids and labels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .added_columns import add_columns
from .assistant_turns import changed_turns, joined_rows, turn_rows
from .attention_masks import strip_padding
from .chat_template import maybe_convert_to_chatml
from .conversation_checks import named_row_errors, named_template_errors
from .dataset_packing import pack_dataset
from .dataset_types import AnyDataset, map_options
from .formats import is_conversational
from .images.preparation import map_rows, with_images
from .images.reader import ImageReader
from .images.tokenization import load_readable
from .question_columns import unseen_questions
from .row_checks import check_sft_columns, check_sft_row
from .row_places import place
from .sft_batch import IGNORED
from .sft_format import SFTFormat, SFTLength
from .sft_images import check_images_fit, tokenize_sft_images
from .token_checks import row_lengths, sequence_lengths
from .tokenization import common_prefix_length, end_with, template_options, warn_of_prompt_tail
from .tokenizer_checks import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Part of the cache's key: datasets hashes a module's function by its name, not by its code. Count it up whenever rows
# come out differently.
FORMAT_VERSION = 2


def tokenize_sft(
    example: dict[str, Any], processing_class: PreTrainedTokenizerBase, how: SFTFormat
) -> dict[str, list[int]]:
    """Returns `input_ids` and `labels` of a row: `prompt` and `completion`, `messages`, or a text.

    Messages go through the chat template, with the row's `tools` (a list, or one as JSON) and `chat_template_kwargs`.
    Text gets the tokenizer's default special tokens, and the EOS token if it does not end with it. A completion starts
    where the prompt's own tokens and those of the whole first differ (see `tokenize_preference`). A label is the token
    itself, or -100 where the token is not learned.
    """
    conversational = is_conversational(example)
    if not conversational:
        check_tokenizer(processing_class, needs_eos=True)
    options = {"chat_template": how.chat_template, **template_options(example)}

    def encode(value: Any, **more: Any) -> dict[str, list[int]]:
        if not conversational:
            encoded: Any = processing_class(text=value)
        else:
            encoded = processing_class.apply_chat_template(value, tokenize=True, return_dict=True, **more, **options)
        return encoded

    marks = {"return_assistant_tokens_mask": how.assistant_only_loss}
    if "completion" in example:
        prompt, completion = example["prompt"], example["completion"]
        if not conversational:
            completion = end_with(completion, processing_class.eos_token)
        prompt_ids = encode(prompt, add_generation_prompt=True)["input_ids"]
        encoded = encode(prompt + completion, **marks)
        start = common_prefix_length(prompt_ids, encoded["input_ids"])
        if start < len(prompt_ids):
            warn_of_prompt_tail(str(processing_class.decode(prompt_ids[start:])))
    else:
        start = 0
        text = example["messages"] if conversational else end_with(example[how.text_field], processing_class.eos_token)
        encoded = encode(text, **marks)
    ids = list(encoded["input_ids"])
    masks = [encoded["assistant_masks"]] if how.assistant_only_loss else []
    if how.completion_only_loss and start:
        masks.append([0] * start + [1] * (len(ids) - start))
    return {"input_ids": ids, "labels": _masked(ids, masks)}


def tokenize_turns(
    example: dict[str, Any], processing_class: PreTrainedTokenizerBase, how: SFTFormat
) -> dict[str, list[int]]:
    """Returns `input_ids`, `labels` and `seq_lengths` of the sequences of a conversation, one for each turn.

    A turn of the assistant and what stands before it are tokenized as `tokenize_sft` does a completion and its prompt.
    """
    rows = turn_rows(example, completion_only=how.completion_only_loss)
    how = replace(how, completion_only_loss=True, assistant_only_loss=False)
    return joined_rows(tokenize_sft(row, processing_class, how) for row in rows)


def prepare_sft_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    how: SFTFormat,
    length: SFTLength,
    *,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    image_reader: ImageReader | None = None,
    shuffle_seed: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Checks a dataset, tokenizes it, labels its tokens, cuts or packs its rows.

    Rows have `messages`, `conversations`, `prompt` and `completion`, or text in `how.text_field`, which
    `formatting_func` writes if there is one; or they are tokenized: `input_ids`, with `labels`, or with masks
    (`completion_mask`, `assistant_masks`) that labels are made from, or nothing else. The answer has `input_ids` and
    `labels` (int64 lists), and `seq_lengths` where a row holds several sequences: it is packed by best-fit, or has the
    assistant's turns apart. A dataset that has them comes back as it is.

    Rows that have no label left after truncation are dropped; how much is cut and dropped is logged. With a
    `shuffle_seed`, rows are shuffled before they are packed, and at the end. Streams are processed as they are read.

    `image_reader` reads images: those of the columns `images` (lists) or `image`, or in the messages. Their tokens are
    in `input_ids`; they themselves stay in the dataset as they are stored, and `max_length` may cut none.

    Raises ValueError for bad data, naming the dataset `name` and the row.
    """
    dataset, image_reader = with_images(dataset, image_reader, num_proc=num_proc, name=name)
    columns = check_sft_columns(
        dataset, how.text_field, formatting_func is not None, name, reads_images=image_reader is not None
    )
    if "seq_lengths" in columns:
        return dataset
    if how.separates_turns:
        _check_makes_turns(columns, formatting_func, name)
    if "input_ids" in columns:
        if formatting_func is not None:
            logger.warning(f"The {name} dataset has input_ids already: formatting_func is ignored.")
        dataset = strip_padding(dataset, ("input_ids",), num_proc=num_proc, name=name)
        dataset = _label(dataset, columns, how, num_proc, name)
    else:
        if formatting_func is None:
            _warn_of_questions(dataset, how.text_field, name)
        else:
            dataset = _format(dataset, columns, formatting_func, how.text_field, num_proc, name)
        dataset = _tokenize(dataset, processing_class, how, length, image_reader, num_proc, name)
    if isinstance(dataset, Dataset):
        _report_cut(dataset, length, name)
    if length.packing_strategy is not None and length.max_length is not None:
        dataset = dataset.select_columns(["input_ids", "labels"])
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed)
        options = map_options(dataset, num_proc, f"Packing {name} dataset")
        dataset = pack_dataset(dataset, length.max_length, length.packing_strategy, options)
    elif length.max_length is not None:
        truncate = _truncate_turns if how.separates_turns else _truncate
        dataset = truncate(dataset, length, num_proc, name, image_reader is not None)
    return dataset if shuffle_seed is None else dataset.shuffle(seed=shuffle_seed)


def _tokenize(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    how: SFTFormat,
    length: SFTLength,
    image_reader: ImageReader | None,
    num_proc: int | None,
    name: str,
) -> AnyDataset:
    """Returns the dataset with token ids and labels."""
    arguments = {"how": how, "name": name, "version": FORMAT_VERSION}
    desc = f"Tokenizing {name} dataset"
    if image_reader is not None:
        arguments["max_length"] = length.max_length
        return map_rows(dataset, _tokenize_image_row, arguments, image_reader, num_proc, desc)
    return map_rows(dataset, _tokenize_row, {**arguments, "processing_class": processing_class}, None, num_proc, desc)


def _check_makes_turns(columns: list[str], formatting_func: Callable | None, name: str) -> None:
    """Raises ValueError if nothing tells the turns of a dataset's conversations."""
    reason = "formatting_func makes one text of each row" if formatting_func else None
    reason = "it is tokenized, without 'seq_lengths' that tell sequences apart" if "input_ids" in columns else reason
    if reason is not None:
        raise ValueError(
            f"The {name} dataset: assistant_turns='separately' needs conversations, but {reason}. Give it as "
            "messages, or set assistant_turns='together'."
        )


def _format(
    dataset: AnyDataset, columns: list[str], function: Callable, text_field: str, num_proc: int | None, name: str
) -> AnyDataset:
    """Returns the dataset with the function's text as its only content."""
    options = map_options(dataset, num_proc, f"Formatting {name} dataset")
    replaced = [column for column in ("messages", "conversations", "prompt", "completion") if column in columns]
    return dataset.map(
        _format_row,
        with_indices=True,
        fn_kwargs={"function": function, "text_field": text_field, "name": name},
        remove_columns=replaced,
        **options,
    )


def _warn_of_questions(dataset: AnyDataset, text_field: str, name: str) -> None:
    """Says so if the first row is a text that does not hold the question beside it."""
    row = next(iter(dataset))
    unseen = unseen_questions(row, [text_field])
    if unseen and text_field in row and not {"messages", "conversations"} & row.keys() and "completion" not in row:
        logger.warning(
            f"The {name} dataset: {text_field!r} alone is trained: the text of {', '.join(map(repr, unseen))} is not "
            "in it. If it belongs to it, name it 'prompt' and the text 'completion', or give a formatting_func."
        )


def _label(dataset: AnyDataset, columns: list[str], how: SFTFormat, num_proc: int | None, name: str) -> AnyDataset:
    """Returns a tokenized dataset with labels."""
    if "labels" in columns:
        return dataset
    masks = [column for column in ("completion_mask", "assistant_masks") if column in columns]
    if "completion_mask" in masks and not how.completion_only_loss:
        logger.warning(
            f"The {name} dataset's completion_mask is ignored, so prompts are learned too; set "
            "completion_only_loss=True to learn completions only."
        )
        masks.remove("completion_mask")
    options = map_options(dataset, num_proc, f"Labelling {name} dataset")
    return dataset.map(
        _label_row, with_indices=True, fn_kwargs={"masks": masks, "name": name}, remove_columns=masks, **options
    )


def _truncate(dataset: AnyDataset, length: SFTLength, num_proc: int | None, name: str, has_images: bool) -> AnyDataset:
    desc = f"Truncating {name} dataset"
    arguments = {"max_length": length.max_length, "mode": length.truncation_mode}
    if has_images:
        # The images are not copied.
        dataset = add_columns(dataset, _truncate_numbered_row, num_proc=num_proc, desc=desc, fn_kwargs=arguments)
    else:
        options = {**map_options(dataset, num_proc, desc), "fn_kwargs": arguments}
        dataset = dataset.map(_truncate_row, input_columns=["input_ids", "labels"], **options)
    return _with_labels(dataset, length, num_proc, name)


def _truncate_turns(
    dataset: AnyDataset, length: SFTLength, num_proc: int | None, name: str, has_images: bool
) -> AnyDataset:
    desc = f"Truncating {name} dataset"
    arguments = {"max_length": length.max_length, "mode": length.truncation_mode}
    if has_images:
        cut = add_columns(dataset, _truncate_turns_row, num_proc=num_proc, desc=desc, fn_kwargs=arguments)
    else:
        options = map_options(dataset, num_proc, desc)
        cut = dataset.map(_truncate_turns_row, with_indices=True, fn_kwargs=arguments, **options)
    if isinstance(dataset, Dataset):
        before, after = (len(sequence_lengths(part)) for part in (dataset, cut))
        if after < before:
            logger.warning(
                f"The {name} dataset: {before - after} of {before} turns have no token to learn within max_length and "
                "are left out."
            )
    return _with_labels(cut, length, num_proc, name)


def _with_labels(dataset: AnyDataset, length: SFTLength, num_proc: int | None, name: str) -> AnyDataset:
    """Returns the dataset without rows of which no token is learned."""
    options = map_options(dataset, num_proc, f"Dropping rows without labels from {name} dataset")
    kept = dataset.filter(_has_label, input_columns=["labels"], **options)
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        dropped = f"{len(dataset) - len(kept)} of {len(dataset)} rows"
        if len(kept) == 0:
            raise ValueError(
                f"The {name} dataset is empty: no row has a token to learn among the max_length={length.max_length} "
                f"that truncation_mode={length.truncation_mode!r} leaves. Raise max_length, or check the masks."
            )
        logger.warning(f"The {name} dataset: {dropped} have no token to learn within max_length and are dropped.")
    return kept


def _report_cut(dataset: Dataset, length: SFTLength, name: str) -> None:
    """Logs in one line how `length` cuts a dataset's rows, or the turns in them, if it does."""
    lengths, unit = row_lengths(dataset, name), "rows"
    if "seq_lengths" in dataset.column_names:
        lengths, unit = sequence_lengths(dataset), "turns"
    longer = lengths[lengths > length.max_length] if length.max_length is not None else lengths[:0]
    if len(longer) == 0 or length.packing_strategy == "wrapped":
        return
    rows = f"The {name} dataset: {len(longer)} of {len(lengths)} {unit} are longer than max_length={length.max_length}"
    tokens = f"{(longer - length.max_length).sum()} of {lengths.sum()} tokens"
    if length.packing_strategy == "bfd_split":
        logger.warning(f"{rows} and are split into pieces (packing_strategy='bfd_split').")
    elif length.packing_strategy is not None:
        logger.warning(
            f"{rows}; packing_strategy={length.packing_strategy!r} cuts {tokens} off their ends, 'bfd_split' would "
            "keep them."
        )
    else:
        logger.warning(f"{rows}; truncation_mode={length.truncation_mode!r} cuts {tokens} off.")


def _masked(ids: list[int], masks: list[list[int]]) -> list[int]:
    return [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks, strict=True)]


# The functions given to `map` and `filter` stand at module level: datasets pickles them for its worker processes and
# hashes them for its cache.


def _format_row(example: dict[str, Any], row: int, function: Callable, text_field: str, name: str) -> dict[str, str]:
    try:
        text = function(example)
    except Exception as error:
        raise ValueError(f"{place(name, row)}: formatting_func raised {type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise TypeError(
            f"{place(name, row)}: formatting_func returned {type(text).__name__}; expected a string for each row."
        )
    return {text_field: text}


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    how: SFTFormat,
    name: str,
    version: int,
) -> dict[str, Any]:
    example = maybe_convert_to_chatml(check_sft_row(example, how.text_field, row, name))
    with named_template_errors(example, processing_class, row, name):
        if how.separates_turns:
            return tokenize_turns(example, processing_class, how)
        tokens = tokenize_sft(example, processing_class, how)
    _check_is_said(tokens, how, row, name)
    return tokens


def _tokenize_image_row(
    example: dict[str, Any],
    row: int,
    image_reader: ImageReader,
    how: SFTFormat,
    max_length: int | None,
    name: str,
    version: int,
) -> dict[str, Any]:
    images = load_readable(example, image_reader, row, name)
    example = maybe_convert_to_chatml(check_sft_row(example, how.text_field, row, name, reads_images=True))
    with named_row_errors(row, name):
        tokens = tokenize_sft_images(example, images, image_reader, how)
        check_images_fit(tokens, image_reader.image_token_id, max_length)
    if not how.separates_turns:
        _check_is_said(tokens, how, row, name)
    return tokens


def _check_is_said(tokens: dict[str, list[int]], how: SFTFormat, row: int, name: str) -> None:
    if how.assistant_only_loss and not _has_label(tokens["labels"]):
        raise ValueError(
            f"{place(name, row)}: assistant_only_loss=True, but no token is marked as the assistant's. Check that the "
            "row has a message with role 'assistant', and that the chat template puts {% generation %} around it."
        )


def _label_row(example: dict[str, Any], row: int, masks: list[str], name: str) -> dict[str, list[int]]:
    ids = example["input_ids"]
    for column in masks:
        if len(example[column]) != len(ids):
            raise ValueError(
                f"{place(name, row)}: column {column!r} has {len(example[column])} elements, 'input_ids' {len(ids)}; "
                "expected as many."
            )
    return {"labels": _masked(ids, [example[column] for column in masks])}


def _truncate_row(input_ids: list[int], labels: list[int], max_length: int, mode: str) -> dict[str, list[int]]:
    kept = slice(None, max_length) if mode == "keep_start" else slice(-max_length, None)
    return {"input_ids": input_ids[kept], "labels": labels[kept]}


def _truncate_numbered_row(example: dict[str, Any], row: int, max_length: int, mode: str) -> dict[str, list[int]]:
    return _truncate_row(example["input_ids"], example["labels"], max_length, mode)


def _truncate_turns_row(example: dict[str, Any], row: int, max_length: int, mode: str) -> dict[str, list[int]]:
    def cut(input_ids: list[int], labels: list[int]) -> dict[str, list[int]] | None:
        row = _truncate_row(input_ids, labels, max_length, mode)
        return row if _has_label(row["labels"]) else None

    return changed_turns(example, cut)


def _has_label(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels)
