"""What can be wrong with preference data, found before training starts.

Every error names the dataset and row, the column or field, the value, and the remedy.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .dataset_types import AnyDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SHOWN_ROWS = 5
SCAN_ROWS = 1000


def check_preference_columns(
    dataset: AnyDataset, name: str = "train", token_columns: tuple[str, ...] = TOKEN_COLUMNS
) -> list[str]:
    """The column names of a preference dataset (a stream's are those of its first row).

    Raises ValueError if the dataset is empty, has image columns, or has neither `chosen` and `rejected` nor all the
    token columns.
    """
    columns = text_columns(dataset, "at least one preference pair", name)
    if not ({"chosen", "rejected"} <= set(columns) or set(token_columns) <= set(columns)):
        raise ValueError(
            f"The {name} dataset has the columns {columns}; expected 'chosen' and 'rejected' (with or without "
            f"'prompt'), or the tokenized {', '.join(token_columns)}. Rename yours with dataset.rename_column(...)."
        )
    return columns


def text_columns(dataset: AnyDataset, expected: str, name: str = "train") -> list[str]:
    """The column names of a dataset of texts (a stream's are those of its first row).

    Raises ValueError if the dataset has no row, where `expected` says what it should have, or has image columns.
    """
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset has no rows; expected {expected}.")
    columns = list(first_row)
    images = [column for column in ("image", "images") if column in columns]
    if images:
        raise ValueError(
            f"The {name} dataset has the column {images[0]!r}: vision data is not supported yet. Remove the column to "
            "train on the text alone."
        )
    return columns


def check_preference_row(
    example: dict[str, Any], row: int, name: str = "train", *, one_may_be_empty: bool = False
) -> None:
    """Raise ValueError unless `chosen`, `rejected` and `prompt` (if any) are all text or all lists of messages.

    A `prompt` of the other kind than the completions is let through where they are messages: it is then ignored, and
    the prompt taken from the messages that `chosen` and `rejected` share. Empty completions are refused; with
    `one_may_be_empty` only where both are.
    """
    kinds = {}
    empty = [column for column in ("chosen", "rejected") if example.get(column) in ("", [])]
    if empty and not (one_may_be_empty and len(empty) == 1):
        raise ValueError(f"{place(name, row)}, column {empty[0]!r}: the completion is empty. {remove_rows(empty[0])}")
    for column in ("chosen", "rejected", "prompt"):
        if column == "prompt" and column not in example:
            continue
        value = example.get(column)
        kinds[column] = kind_of(value)
        if kinds[column] is None:
            raise ValueError(
                f"{place(name, row)}, column {column!r}: {shorten(value)} is of type {type(value).__name__}; "
                "expected a string, or a list of messages such as {'role': 'assistant', 'content': 'Hello.'}."
            )
    if kinds["chosen"] != kinds["rejected"] or (kinds["chosen"] == "text" and kinds.get("prompt", "text") != "text"):
        found = ", ".join(f"{column!r} is {kind}" for column, kind in kinds.items())
        raise ValueError(f"{place(name, row)}: {found}; expected all of them to be text, or all messages.")


def kind_of(value: Any) -> str | None:
    """ "text" for a string, "messages" for a list of dicts with a role, None for anything else."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
        return "messages"
    return None


def check_tokenizer(processing_class: "PreTrainedTokenizerBase", *, needs_eos: bool = False) -> None:
    """Raise ValueError if the tokenizer has neither a pad nor an EOS token, or no EOS token where text needs one."""
    if processing_class.eos_token is None and needs_eos:
        raise ValueError(
            f"processing_class ({type(processing_class).__name__}) has eos_token=None, but completions given as text "
            "end with the EOS token. Set processing_class.eos_token, or give the data as messages."
        )
    if processing_class.pad_token is None and processing_class.eos_token is None:
        raise ValueError(
            f"processing_class ({type(processing_class).__name__}) has pad_token=None and eos_token=None; expected at "
            "least one of them to pad with. Set processing_class.pad_token."
        )


def check_completions(dataset: Dataset, name: str = "train") -> None:
    """Look through the token columns for completions that cannot teach anything.

    Raises ValueError if a completion has no token, or if chosen equals rejected in every row; warns once, with the
    count and the first rows, if it does in some.
    """
    identical = []
    for start, table in _token_tables(dataset, TOKEN_COLUMNS[1:]):
        chosen, rejected = (table[column].combine_chunks() for column in TOKEN_COLUMNS[1:])
        lengths = {}
        for column, values in (("chosen", chosen), ("rejected", rejected)):
            lengths[column] = pc.fill_null(pc.list_value_length(values), 0)
            empty = pc.index(lengths[column], 0).as_py()
            if empty >= 0:
                raise ValueError(
                    f"{place(name, start + empty)}, column '{column}_ids': the completion has no tokens. "
                    f"{remove_rows(column + '_ids')}"
                )
        same_length = pc.indices_nonzero(pc.equal(lengths["chosen"], lengths["rejected"])).to_pylist()
        identical += [start + row for row in same_length if chosen[row].values.equals(rejected[row].values)]
    if identical and len(identical) == len(dataset):
        raise ValueError(
            f"The {name} dataset: 'chosen' equals 'rejected' in all {len(dataset)} rows, so there is no preference to "
            "learn. Check how the two columns were filled."
        )
    if identical:
        rows = ", ".join(str(row) for row in identical[:SHOWN_ROWS]) + (", …" if len(identical) > SHOWN_ROWS else "")
        logger.warning(
            f"The {name} dataset: 'chosen' equals 'rejected' in {len(identical)} of {len(dataset)} rows (row {rows}). "
            "They teach no preference; remove them with dataset.filter(...)."
        )


def check_not_emptied(dataset: Dataset, max_length: int, name: str = "train") -> None:
    """Raise ValueError if no row was left after those were dropped whose prompt fills `max_length`."""
    if len(dataset) == 0:
        raise ValueError(
            f"The {name} dataset is empty: in every row the prompt alone has max_length={max_length} tokens or more, "
            "which leaves no room for a completion. Raise max_length, or set it to None."
        )


def check_token_ids(
    dataset: Dataset, vocab_size: int, name: str = "train", columns: tuple[str, ...] = TOKEN_COLUMNS
) -> int:
    """Return the largest token id of `columns`.

    Raises ValueError if an id is negative or not below `vocab_size`, the number of rows of the model's head.
    """
    largest = -1
    for start, table in _token_tables(dataset, columns):
        for column in columns:
            extremes = pc.min_max(table[column].combine_chunks().flatten()).as_py()
            if extremes["max"] is None:
                continue
            if extremes["min"] < 0 or extremes["max"] >= vocab_size:
                token = extremes["min"] if extremes["min"] < 0 else extremes["max"]
                row = next(row for row, ids in enumerate(table[column].to_pylist()) if token in (ids or ()))
                raise ValueError(
                    f"{place(name, start + row)}, column {column!r}: token id {token} is outside the vocabulary of "
                    f"the model's head, which has {vocab_size} entries. Use the model's own tokenizer, or call "
                    "model.resize_token_embeddings(len(tokenizer)) after adding tokens to it."
                )
            largest = max(largest, extremes["max"])
    return largest


def longest_sequence(dataset: Dataset, columns: tuple[str, ...] = TOKEN_COLUMNS) -> int:
    """Tokens of the longest sequence; a prompt in `prompt_ids` counts with each of the other columns.

    A dataset of packed rows tells the lengths of their sequences in `seq_lengths`.
    """
    longest = 0
    packed = "seq_lengths" in dataset.column_names
    for _, table in _token_tables(dataset, ("seq_lengths",) if packed else columns):
        if packed:
            found = [table["seq_lengths"].combine_chunks().flatten()]
        else:
            lengths = {name: pc.list_value_length(table[name]) for name in columns}
            prompt = lengths.pop("prompt_ids", 0)
            found = [pc.add(length, prompt) for length in lengths.values()] or [prompt]
        longest = max([longest, *(pc.max(values).as_py() or 0 for values in found)])
    return longest


def check_head_vocabulary(
    processing_class: "PreTrainedTokenizerBase", vocab_size: int, largest_id: int | None = None
) -> None:
    """Raise ValueError if the tokenizer knows token ids that the model's head of `vocab_size` rows has no row for.

    Some models ship like that (Gemma 3's text models know an image token that they have no row for), so special
    tokens beyond the head only cause a warning if no datum holds them: `largest_id` is then the largest id in all the
    data (`check_token_ids`), or None where that is not known.
    """
    beyond = [token_id for token_id in processing_class.get_vocab().values() if token_id >= vocab_size]
    if not beyond:
        return
    message = (
        f"processing_class ({type(processing_class).__name__}) has {len(processing_class)} tokens, the model's head "
        f"only vocab_size={vocab_size}. Call model.resize_token_embeddings({len(processing_class)}), or use the "
        "model's own tokenizer."
    )
    added = processing_class.added_tokens_decoder
    all_special = all(token_id in added and added[token_id].special for token_id in beyond)
    pad_or_eos = processing_class.eos_token_id if processing_class.pad_token is None else processing_class.pad_token_id
    if largest_id is None or largest_id >= vocab_size or not all_special or pad_or_eos in beyond:
        raise ValueError(message)
    logger.warning(f"{message} The data holds none of the tokens beyond the head, so training goes on.")


def _token_tables(dataset: Dataset, columns: tuple[str, ...] = TOKEN_COLUMNS) -> Iterator[tuple[int, pa.Table]]:
    """The token columns in slices of `SCAN_ROWS` rows, each with the number of its first row."""
    tables = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=SCAN_ROWS)
    for index, table in enumerate(tables):
        yield index * SCAN_ROWS, table


def place(name: str, row: int) -> str:
    """Where something is wrong, for the start of a message."""
    return f"The {name} dataset, row {row}"


def remove_rows(column: str) -> str:
    """What to do about an empty completion, for the end of a message."""
    return f"Fill it, or remove such rows with dataset.filter(lambda row: len(row[{column!r}]) > 0)."


def shorten(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
