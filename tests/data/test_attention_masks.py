"""Tokenized rows that were padded before: their attention masks tell what is padding."""

import pytest
from datasets import Dataset, IterableDataset

from support.tokenizer import build_tokenizer
from trl_fast.data import (
    SFTFormat,
    SFTLength,
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_sft_dataset,
    prepare_unpaired_dataset,
)
from trl_fast.data.prompt_only import prompts_of_tokens


def prepare_sft(rows, tokenizer, **how):
    return prepare_sft_dataset(rows, tokenizer, SFTFormat(completion_only_loss=True), SFTLength(), **how)


# For each kind: its preparation, a row without padding, and the columns of tokens with their masks.
KINDS = {
    "sft": (prepare_sft, {"input_ids": [5, 6, 7]}, {"input_ids": "attention_mask"}),
    "sft with labels": (
        prepare_sft,
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": "attention_mask", "labels": "attention_mask"},
    ),
    "sft with masks": (
        prepare_sft,
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [0, 1, 0]},
        dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), "attention_mask"),
    ),
    "dpo": (
        prepare_preference_dataset,
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]},
        {f"{part}_ids": f"{part}_attention_mask" for part in ("prompt", "chosen", "rejected")},
    ),
    "kto": (
        prepare_unpaired_dataset,
        {"prompt_ids": [5, 6], "completion_ids": [7, 8], "label": True},
        {f"{part}_ids": f"{part}_attention_mask" for part in ("prompt", "completion")},
    ),
    "reward": (
        prepare_reward_dataset,
        {"chosen_ids": [7, 8], "rejected_ids": [9]},
        {f"{part}_ids": f"{part}_attention_mask" for part in ("chosen", "rejected")},
    ),
    "ppo": (prompts_of_tokens, {"input_ids": [5, 6]}, {"input_ids": "attention_mask"}),
}


def padded(row, masks):
    """The row with two pads before and one behind, and the masks that say so."""
    pads = {column: [3, 3, *row[column], 3] for column in masks}
    bits = {mask: [0, 0, *[1] * len(row[column]), 0] for column, mask in masks.items()}
    return {**row, **pads, **bits}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_stripped(kind, streamed):
    prepare, row, masks = KINDS[kind]
    datasets = [Dataset.from_list([rows, rows]) for rows in (row, padded(row, masks))]
    if streamed:
        datasets = [dataset.to_iterable_dataset() for dataset in datasets]
    plain, stripped = (list(prepare(dataset, build_tokenizer())) for dataset in datasets)
    assert plain == stripped
    assert not {name for name in stripped[0] if name.endswith("attention_mask")}


def test_rows_in_torchs_format():
    prepare, row, masks = KINDS["sft"]
    dataset = Dataset.from_list([padded(row, masks)]).with_format("torch")
    assert prepare(dataset, build_tokenizer())[0]["input_ids"].tolist() == row["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_another_length(kind):
    prepare, row, masks = KINDS[kind]
    good = padded(row, masks)
    column, mask = next(iter(masks.items()))
    bad = {**good, mask: good[mask][1:]}
    message = rf"The train dataset, row 1: column '{mask}' has \d elements, '{column}' \d; expected as many"
    with pytest.raises(ValueError, match=message):
        list(prepare(Dataset.from_list([good, bad]), build_tokenizer()))


def test_a_mask_of_other_numbers():
    prepare, row, masks = KINDS["sft"]
    bad = {**padded(row, masks), "attention_mask": [0, 0, 2, 1, 1, 0]}
    with pytest.raises(ValueError, match=r"row 0, column 'attention_mask': expected 0 \(padding\) and 1, got"):
        prepare(Dataset.from_list([bad]), build_tokenizer())


def test_a_stream_without_known_columns():
    prepare, row, masks = KINDS["dpo"]
    stream = IterableDataset.from_generator(lambda: iter([padded(row, masks)]))
    assert list(prepare(stream, build_tokenizer())) == [row]
