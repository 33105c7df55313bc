"""Labelled sequences as batches: what is scored, in which layout, and TRL's collator."""

import random

import pytest
import torch
from transformers import DataCollatorForLanguageModeling as CausalCollator
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

from support.tokenizer import build_tokenizer
from trl_fast.data import (
    DataCollatorForLanguageModeling,
    LabelledCollator,
    pack_labelled,
    unpacked,
)

PAD = 2
ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
    {"input_ids": [8], "labels": [8]},
    {"input_ids": [9, 10], "labels": [-100, 10]},
]


def random_rows(count, seed, packed=False, labelled=True):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        lengths = [rng.randint(1, 6) for _ in range(rng.randint(1, 3) if packed else 1)]
        ids = [rng.randrange(3, 50) for _ in range(sum(lengths))]
        row = {"input_ids": ids}
        if labelled:
            row["labels"] = [token if rng.random() < 0.6 else -100 for token in ids]
        rows.append(row | ({"seq_lengths": lengths} if packed else {}))
    return rows


def scored(batch):
    """(sequence, index in it, predicting token, token) of each scored token."""
    ids, places = batch.input_ids.flatten(), batch.score_positions
    assert batch.position_ids.flatten()[places].add(1).tolist() == batch.offset.tolist()
    columns = (batch.branch, batch.offset, ids[places], batch.targets)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_token_is_scored_if_it_has_a_label_and_something_before_it(layout):
    batch = LabelledCollator(PAD, layout).collate(ROWS)
    assert scored(batch) == [(0, 2, 6, 7), (2, 1, 9, 10)]
    assert batch.branch_lengths.tolist() == [3, 1, 2] and batch.num_tokens == 6 and len(batch) == 3


def test_the_layouts():
    packed, padded = (LabelledCollator(PAD, layout).collate(ROWS) for layout in ("packed", "padded"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]] and packed.attention_mask is None
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]] and packed.sequence_lengths == (3, 1, 2)
    assert padded.input_ids.tolist() == [[5, 6, 7], [8, PAD, PAD], [9, 10, PAD]]
    assert padded.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and padded.sequence_lengths is None
    assert padded["labels"].tolist() == [[5, -100, 7], [8, -100, -100], [-100, 10, -100]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("labelled", [True, False])
def test_both_layouts_score_the_same_and_a_packed_row_is_several_sequences(seed, labelled):
    rows = random_rows(4, seed, packed=True, labelled=labelled)
    packed, padded = (LabelledCollator(PAD, layout).collate(rows) for layout in ("packed", "padded"))
    assert scored(packed) == scored(padded)
    lengths = [length for row in rows for length in row["seq_lengths"]]
    assert list(packed.sequence_lengths) == padded.branch_lengths.tolist() == lengths
    back = unpacked(packed, PAD)
    assert torch.equal(back.input_ids, padded.input_ids) and torch.equal(back["labels"], padded["labels"])
    assert scored(back) == scored(padded) and unpacked(padded, PAD) is padded


def test_padding_to_a_multiple():
    padded = LabelledCollator(PAD, "padded", pad_to_multiple_of=4).collate(ROWS)
    assert padded.input_ids.shape == (3, 4) and padded.num_tokens == 6
    packed = LabelledCollator(PAD, "packed", pad_to_multiple_of=4, padding_free=True).collate(ROWS)
    assert packed.sequence_lengths == (3, 1, 2, 1, 1) and packed.num_tokens == 8
    assert scored(packed) == scored(padded)


def test_pad_and_end_tokens_in_the_data_are_learned():
    batch = pack_labelled([([5, PAD], [5, PAD]), ([6], [6])], "padded", PAD)
    assert scored(batch) == [(0, 1, 5, PAD)] and batch.num_tokens == 3


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_nothing_to_learn(layout):
    batch = pack_labelled([([5, 6], [-100, -100])], layout, PAD)
    assert len(batch.targets) == 0 and batch.num_tokens == 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="layout='flat'"):
        pack_labelled([([1], [1])], "flat", PAD)
    with pytest.raises(ValueError, match="Sequence 1 .* 2 tokens and 1 labels"):
        pack_labelled([([1], [1]), ([1, 2], [1])], "packed", PAD)


SETTINGS = [
    {},
    {"padding_free": True},
    {"return_position_ids": True},
    {"pad_to_multiple_of": 8},
    {"padding_free": True, "pad_to_multiple_of": 8},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_collates_as_trl_does(settings, packed, labelled):
    for seed in range(4):
        rows = random_rows(3, seed, packed, labelled)
        ours = DataCollatorForLanguageModeling(PAD, **settings)(rows)
        theirs = TrlCollator(PAD, **settings)(rows)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype, name
            else:
                assert ours[name] == value, name


COLLATORS = {
    "ours": DataCollatorForLanguageModeling(PAD),
    "ours without padding": DataCollatorForLanguageModeling(PAD, padding_free=True),
    "TRL's": TrlCollator(PAD),
    "TRL's without padding": TrlCollator(PAD, padding_free=True),
    "flattening": DataCollatorWithFlattening(),
}


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS.keys())
def test_batches_of_other_collators_are_converted(collator):
    rows = random_rows(5, 0)
    for layout in ("packed", "padded"):
        ours = LabelledCollator(PAD, layout)
        assert scored(ours.token_batch(collator(rows))) == scored(ours.collate(rows))


def test_the_collator_of_transformers_is_converted():
    tokenizer = build_tokenizer()
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    batch = LabelledCollator(PAD, "packed").token_batch(CausalCollator(tokenizer, mlm=False)(rows))
    assert scored(batch) == [(0, 1, 5, 6), (0, 2, 6, 7)]


def test_what_cannot_be_converted_is_named():
    collator = LabelledCollator(PAD, "packed")
    with pytest.raises(ValueError, match="'pixel_values', which the loss does not read; take them out"):
        collator.token_batch(dict.fromkeys(["input_ids", "labels", "pixel_values"]))
    with pytest.raises(ValueError, match=r"has \['input_ids'\], but the loss reads 'labels' too"):
        collator.token_batch({"input_ids": None})
    with pytest.raises(ValueError, match="there are 2 rows"):
        names = ("input_ids", "labels", "position_ids")
        collator.token_batch({name: torch.ones(2, 3, dtype=torch.int64) for name in names})
