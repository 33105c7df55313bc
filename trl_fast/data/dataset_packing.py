"""Packs the rows of a dataset into rows of a fixed length, or cuts them to one."""

from __future__ import annotations

import bisect
import warnings
from collections import deque
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from trl_fast.settings.choices import PACKING_STRATEGIES

from .dataset_types import DatasetOrDict

# Names that older versions of TRL used.
OLDER_STRATEGIES = {"ffd": "bfd", "bfd-requeue": "bfd_split"}


def pack_dataset(
    dataset: DatasetOrDict, seq_length: int, strategy: str = "bfd", map_kwargs: dict[str, Any] | None = None
) -> DatasetOrDict:
    """Packs the rows of a dataset, whose columns are lists of equal lengths, into rows of up to `seq_length` elements.

    - `bfd`: best-fit decreasing (arXiv 2404.10830). Longest rows first, each goes into the fullest bin that has room;
      rows longer than `seq_length` lose their end. The new column `seq_lengths` tells how long each part of a row is.
    - `bfd_split`: the same, but longer rows are split into pieces, each of which is packed by itself.
    - `wrapped`: all rows are joined and cut every `seq_length` elements, wherever that is.

    Rows of one batch of `dataset.map` (1000, if `map_kwargs` does not say otherwise) are packed together.

    `ffd` and `bfd-requeue` are older names of the first two.

    Raises ValueError for an unknown strategy and for columns of different lengths, TypeError for one that is no list.
    """
    if strategy in OLDER_STRATEGIES:
        now = OLDER_STRATEGIES[strategy]
        warnings.warn(f"packing strategy {strategy!r} is now called {now!r}", FutureWarning, stacklevel=2)
        strategy = now
    if strategy not in PACKING_STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; expected one of {', '.join(PACKING_STRATEGIES)}.")
    if strategy == "wrapped":
        return _map_arrow(dataset, _pack_wrapped, {"seq_length": seq_length}, map_kwargs)
    arguments = {"seq_length": seq_length, "split": strategy == "bfd_split"}
    return _map_arrow(dataset, _pack_best_fit, arguments, map_kwargs, new_columns=["seq_lengths"])


def truncate_dataset(
    dataset: DatasetOrDict, max_length: int, map_kwargs: dict[str, Any] | None = None
) -> DatasetOrDict:
    """Cuts every list of every row to its first `max_length` elements; other columns stay as they are."""
    return _map_arrow(dataset, _truncate, {"max_length": max_length}, map_kwargs)


def _map_arrow(
    dataset: DatasetOrDict,
    function: Any,
    arguments: dict,
    map_kwargs: dict | None,
    new_columns: list[str] | None = None,
) -> DatasetOrDict:
    """Applies `dataset.map` to Arrow tables; the result has the format that the dataset had."""
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    if isinstance(first, Dataset):
        before: dict[str, Any] = dict(first.format)
        shown: list[str] = before.pop("columns")
        before["columns"] = None if shown == first.column_names else [*shown, *(new_columns or [])]
        before.update(before.pop("format_kwargs"))
    else:
        before = {"type": first._formatting.format_type if first._formatting is not None else None}
    mapped = dataset.with_format("arrow").map(function, batched=True, fn_kwargs=arguments, **(map_kwargs or {}))
    return mapped.with_format(**before)


# The functions given to `map` stand at module level: datasets pickles them for its worker processes and hashes them
# for its cache.


def _truncate(table: pa.Table, max_length: int) -> pa.Table:
    columns = [pc.list_slice(column, 0, max_length) if _is_list(column.type) else column for column in table.columns]
    return pa.Table.from_arrays(columns, names=table.column_names)


def _pack_wrapped(table: pa.Table, seq_length: int) -> pa.Table:
    columns, lengths = _list_columns(table)
    total = int(lengths.sum())
    cuts = np.append(np.arange(0, total, seq_length), total)
    return pa.Table.from_arrays([_relist(column, cuts) for column in columns], names=table.column_names)


def _pack_best_fit(table: pa.Table, seq_length: int, split: bool) -> pa.Table:
    columns, lengths = _list_columns(table)
    length_type = pc.list_value_length(columns[0]).type
    if split:
        pieces = np.concatenate([np.empty(0, int), *(_pieces(length, seq_length) for length in lengths)])
    else:
        columns = [pc.list_slice(column, 0, seq_length) for column in columns]
        pieces = np.minimum(lengths, seq_length)
    columns = [_relist(column, np.append(0, np.cumsum(pieces))) for column in columns]
    # Empty rows have nothing to pack.
    kept = np.flatnonzero(pieces)
    bins = [kept[members] for members in _best_fit(pieces[kept], seq_length)]
    order = np.concatenate([np.empty(0, int), *bins])
    packed_ends = np.append(0, np.cumsum([pieces[members].sum() for members in bins], dtype=int))
    packed = [_relist(column.take(pa.array(order)), packed_ends) for column in columns]
    counts = np.append(0, np.cumsum([len(members) for members in bins], dtype=np.int32)).astype(np.int32)
    seq_lengths = pa.ListArray.from_arrays(counts, pa.array(pieces[order], type=length_type))
    return pa.Table.from_arrays([*packed, seq_lengths], names=[*table.column_names, "seq_lengths"])


def _best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Returns the members of each bin. Of bins with equally little room the one that has waited longest is filled."""
    bins: list[list[int]] = []
    waiting: dict[int, deque[list[int]]] = {}
    rooms: list[int] = []  # the keys of `waiting`, sorted
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room = capacity
            members: list[int] = []
            bins.append(members)
        else:
            room = rooms[place]
            members = waiting[room].popleft()
            if not waiting[room]:
                del waiting[room], rooms[place]
        members.append(index)
        left = room - length
        if left and left not in waiting:
            waiting[left] = deque()
            bisect.insort(rooms, left)
        if left:
            waiting[left].append(members)
    return bins


def _pieces(length: int, seq_length: int) -> np.ndarray:
    """Returns the lengths of the pieces that a row is cut into: `seq_length` each, and the rest."""
    return np.minimum(seq_length, length - np.arange(0, length, seq_length))


def _list_columns(table: pa.Table) -> tuple[list[pa.Array], np.ndarray]:
    """Returns the columns, each in one piece, and the lengths of their rows."""
    columns = [pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0) for column in table]
    for name, column in zip(table.column_names, columns, strict=True):
        if not _is_list(column.type):
            raise TypeError(f"Column {name!r} is of type {column.type}; packing expects lists in every column.")
    lengths = [pc.list_value_length(column).to_numpy(zero_copy_only=False) for column in columns]
    for name, other in zip(table.column_names[1:], lengths[1:], strict=True):
        if not np.array_equal(lengths[0], other):
            row = int(np.flatnonzero(lengths[0] != other)[0])
            raise ValueError(
                f"Column {name!r} has {other[row]} elements in row {row} of its batch, column "
                f"{table.column_names[0]!r} has {lengths[0][row]}; packing expects equal lengths."
            )
    return columns, lengths[0].astype(int)


def _relist(column: pa.Array, ends: np.ndarray) -> pa.Array:
    """Returns the same elements in lists that end elsewhere."""
    return type(column).from_arrays(pa.array(ends, type=column.offsets.type), column.flatten())


def _is_list(data_type: pa.DataType) -> bool:
    return pa.types.is_list(data_type) or pa.types.is_large_list(data_type)
