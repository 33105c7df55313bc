"""Checks the token ids of a tokenized Dataset, column by column, and measures its rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .row_checks import TOKEN_COLUMNS
from .row_places import place, remove_rows

logger = logging.getLogger(__name__)

# Rows that a message names at most, and rows that are read at a time.
SHOWN_ROWS = 5
SCAN_ROWS = 1000


def check_completions(dataset: Dataset, name: str = "train", others: tuple[str, ...] = ()) -> None:
    """Looks through the token columns for completions that cannot teach anything.

    others: token columns of further completions, which may equal these.

    Raises ValueError if a completion has no token, or if chosen equals rejected in every row; warns once, with the
    count and the first rows, if it does in some.
    """
    identical = []
    columns = (*TOKEN_COLUMNS[1:], *others)
    for start, table in token_tables(dataset, columns):
        chosen, rejected, *_ = (table[column].combine_chunks() for column in columns)
        lengths = {}
        for column in columns:
            lengths[column] = pc.fill_null(pc.list_value_length(table[column].combine_chunks()), 0)
            empty = pc.index(lengths[column], 0).as_py()
            if empty >= 0:
                raise ValueError(
                    f"{place(name, start + empty)}, column {column!r}: the completion has no tokens. "
                    f"{remove_rows(column)}"
                )
        same_length = pc.indices_nonzero(pc.equal(lengths["chosen_ids"], lengths["rejected_ids"])).to_pylist()
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


def check_token_ids(
    dataset: Dataset, vocab_size: int, name: str = "train", columns: tuple[str, ...] = TOKEN_COLUMNS
) -> int:
    """Returns the largest token id of `columns`.

    Raises ValueError if an id is no integer, negative or not below `vocab_size`, the rows of the model's head.
    """
    largest = -1
    for start, table in token_tables(dataset, columns):
        for column in columns:
            _check_integers(table[column].type, place(name, start), column)
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


def _check_integers(kind: pa.DataType, where: str, column: str) -> None:
    """Raises ValueError if a column of token ids holds something else than lists of integers."""
    inner = getattr(kind, "value_type", kind)
    if inner is kind or not (pa.types.is_integer(inner) or pa.types.is_null(inner)):
        raise ValueError(f"{where}, column {column!r}: expected lists of integers, got {kind}. Tokenize the texts.")


def longest_sequence(dataset: Dataset, columns: tuple[str, ...] = TOKEN_COLUMNS) -> int:
    """Returns the tokens of the longest sequence; a prompt in `prompt_ids` counts with each of the other columns.

    A dataset of packed rows tells the lengths of their sequences in `seq_lengths`.
    """
    longest = 0
    packed = "seq_lengths" in dataset.column_names
    for _, table in token_tables(dataset, ("seq_lengths",) if packed else columns):
        if packed:
            found = [table["seq_lengths"].combine_chunks().flatten()]
        else:
            lengths = {name: pc.list_value_length(table[name]) for name in columns}
            prompt = lengths.pop("prompt_ids", 0)
            found = [pc.add(length, prompt) for length in lengths.values()] or [prompt]
        longest = max([longest, *(pc.max(values).as_py() or 0 for values in found)])
    return longest


def row_lengths(dataset: Dataset, name: str = "train") -> np.ndarray:
    """Returns the number of tokens of each row (R,) int64.

    Raises ValueError if a row has more or fewer labels than tokens.
    """
    lengths = [np.empty(0, dtype=np.int64)]
    tables = dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=SCAN_ROWS)
    for index, table in enumerate(tables):
        ids, labels = (
            pc.fill_null(pc.list_value_length(table[column].combine_chunks()), 0).to_numpy(zero_copy_only=False)
            for column in ("input_ids", "labels")
        )
        wrong = np.flatnonzero(ids != labels)
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{place(name, index * SCAN_ROWS + row)}: 'labels' has {labels[row]} elements, 'input_ids' "
                f"{ids[row]}; expected as many."
            )
        lengths.append(ids.astype(np.int64))
    return np.concatenate(lengths)


def sequence_lengths(dataset: Dataset) -> np.ndarray:
    """Returns the tokens of each sequence (S,) int64 of rows that hold several, as `seq_lengths` tells them apart."""
    lengths = [np.empty(0, dtype=np.int64)]
    for _, table in token_tables(dataset, ("seq_lengths",)):
        values = table["seq_lengths"].combine_chunks().flatten()
        lengths.append(values.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(lengths)


def token_tables(dataset: Dataset, columns: tuple[str, ...] = TOKEN_COLUMNS) -> Iterator[tuple[int, pa.Table]]:
    """Yields the token columns in slices of `SCAN_ROWS` rows, each with the number of its first row."""
    tables = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=SCAN_ROWS)
    for index, table in enumerate(tables):
        yield index * SCAN_ROWS, table
