"""Strips the padding of tokenized rows by their attention masks."""

from __future__ import annotations

from typing import Any

from .dataset_types import AnyDataset, get_dataset_column_names, map_options
from .row_places import place

# What else has an element for each token of `input_ids`.
_BESIDE_INPUT_IDS = ("labels", "completion_mask", "assistant_masks")


def strip_padding(
    dataset: AnyDataset, columns: tuple[str, ...], *, num_proc: int | None = None, name: str = "train"
) -> AnyDataset:
    """Returns a tokenized dataset without the tokens that its attention masks rule out, and without the masks.

    The mask of `input_ids` is `attention_mask`, that of `prompt_ids` is `prompt_attention_mask`, and so on. What has
    no such columns comes back as it is.

    Args:
        columns: the columns of token ids.

    Raises:
        ValueError: a mask has another length than its tokens, or holds something other than 0 and 1.
    """
    present = get_dataset_column_names(dataset)
    masks = {column: _mask_name(column) for column in columns if column in present}
    masks = {column: mask for column, mask in masks.items() if mask in present}
    if not masks:
        return dataset
    options = map_options(dataset, num_proc, f"Stripping padding of {name} dataset")
    arguments = {"masks": masks, "name": name}
    return dataset.map(_strip_row, with_indices=True, fn_kwargs=arguments, remove_columns=[*masks.values()], **options)


def _mask_name(column: str) -> str:
    return "attention_mask" if column == "input_ids" else column.removesuffix("_ids") + "_attention_mask"


def _strip_row(example: dict[str, Any], row: int, masks: dict[str, str], name: str) -> dict[str, list[int]]:
    stripped = {}
    for column, mask in masks.items():
        bits = _plain(example[mask])
        if any(bit not in (0, 1) for bit in bits):
            raise ValueError(f"{place(name, row)}, column {mask!r}: expected 0 (padding) and 1, got {bits!r:.80}.")
        beside = _BESIDE_INPUT_IDS if column == "input_ids" else ()
        for cut in (column, *(other for other in beside if other in example)):
            values = _plain(example[cut])
            if len(values) != len(bits):
                raise ValueError(
                    f"{place(name, row)}: column {mask!r} has {len(bits)} elements, {cut!r} {len(values)}; "
                    "expected as many."
                )
            stripped[cut] = [value for value, bit in zip(values, bits, strict=True) if bit]
    return stripped


def _plain(values: Any) -> list[int]:
    """Returns a row's list, whatever format the dataset gives its rows in."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
