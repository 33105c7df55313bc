"""Rows of pairs and triples: TRL's token ids and batches; prompts that are scored, once, in every layout."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.experimental.tpo.tpo_trainer import DataCollatorForTriplePreference as TRLCollator
from trl.experimental.tpo.tpo_trainer import TPOTrainer

from support.preferences import random_pairs
from support.reference_free import color_triples
from support.tokenizer import EOS, build_tokenizer
from trl_fast.data import LAYOUTS, DataCollatorForTriplePreference, PreferenceCollator, prepare_preference_dataset
from trl_fast.data.preference import GOLD_COLUMN

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", GOLD_COLUMN)
TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {}}}])


def triples(count, seed=0):
    golds = [row["chosen_ids"] for row in random_pairs(count, seed + 100)]
    return [{**row, GOLD_COLUMN: gold} for row, gold in zip(random_pairs(count, seed), golds, strict=True)]


def as_messages(row):
    names = ("chosen", "rejected", "reference")
    said = {name: [{"role": "assistant", "content": row[name]}] for name in names}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **said}


DATASETS = {
    "text": color_triples(5),
    "ends as it should": color_triples(3).map(lambda row: {"reference": row["reference"] + EOS}),
    "messages": color_triples(5).map(as_messages),
    "tools": color_triples(5).map(lambda row: {**as_messages(row), "tools": TOOLS}),
    "implicit prompts": color_triples(5).map(
        lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected", "reference")},
        remove_columns="prompt",
    ),
}


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS.keys())
def test_rows_of_triples_are_trls(dataset):
    tokenizer = build_tokenizer()
    trainer = SimpleNamespace(_tokenize=TPOTrainer._tokenize)
    theirs = TPOTrainer._prepare_dataset(trainer, dataset, tokenizer, SimpleNamespace(dataset_num_proc=None), "train")
    ours = prepare_preference_dataset(dataset, tokenizer, others=("reference",))
    assert [[row[name] for name in COLUMNS] for row in ours] == [[row[name] for name in COLUMNS] for row in theirs]
    again = prepare_preference_dataset(ours, tokenizer, others=("reference",))
    assert [row[GOLD_COLUMN] for row in again] == [row[GOLD_COLUMN] for row in ours]


@pytest.mark.parametrize("include_reference", [True, False])
@pytest.mark.parametrize("settings", [{}, {"max_length": 7}, {"max_length": 7, "truncation_mode": "keep_end"}])
def test_batches_of_triples_are_trls(settings, include_reference):
    options = {"pad_token_id": 0, "pad_to_multiple_of": 4, "include_reference": include_reference, **settings}
    theirs = TRLCollator(**options)(triples(5))
    ours = DataCollatorForTriplePreference(**options)(triples(5))
    assert list(ours) == list(theirs)
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values)


def scored(batch):
    """Returns what is scored: by sequence and place, the token that stands there and those before it."""
    flat = batch.input_ids.flatten()
    return [
        (branch, offset, target, flat[position].item())
        for branch, offset, target, position in zip(
            *(values.tolist() for values in (batch.branch, batch.offset, batch.targets, batch.score_positions)),
            strict=True,
        )
    ]


@pytest.mark.parametrize("settings", [{}, {"max_length": 7}, {"max_length": 7, "truncation_mode": "keep_end"}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_are_scored_once_with_the_first_completion(layout, settings, monkeypatch):
    monkeypatch.setattr("trl_fast.data.packing.MIN_SHARED_TOKENS", 1)
    collator = PreferenceCollator(pad_token_id=0, layout=layout, scores_prompts=True, **settings)
    batch = collator.collate(random_pairs(6))
    expected = []
    for number, row in enumerate(batch.sequences()):
        length, tokens = int(batch.branch_lengths[number]), row.tolist()
        start = len(tokens) - length
        first = 1 if number % 2 == 0 else max(start, 1)
        expected += [(number, place - start, tokens[place], tokens[place - 1]) for place in range(first, len(tokens))]
    assert scored(batch) == expected
    assert sum(batch.group_sizes) == len(batch.targets) and (batch.offset < 0).any()
    # A hook that reads the entries gets the same tokens scored; places in prompts are only known to be before 0.
    again = collator.token_batch(collator.entries(batch))
    assert again.group_sizes == batch.group_sizes
    assert [(b, max(o, -1), t, p) for b, o, t, p in scored(again)] == [
        (b, max(o, -1), t, p) for b, o, t, p in scored(batch)
    ]


def test_a_gold_completion_without_the_prompt_is_named():
    rows = Dataset.from_list([{"chosen": "so far: b", "rejected": "so far: c", "reference": "d"}])
    with pytest.raises(ValueError, match="row 0, column 'reference': it does not begin with the prompt"):
        prepare_preference_dataset(rows, build_tokenizer(), others=("reference",))
