"""Data for KTO: the same token ids, rows and mismatched completions as TRL's, and bad data met by name."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import KTOTrainer

from support.tokenizer import EOS, build_tokenizer
from support.training import color_labels, color_pairs
from trl_fast.data.packing import LAYOUTS
from trl_fast.data.unpaired_preference import (
    BOTH,
    LABEL,
    MISMATCHED,
    OWN_TOKENS,
    UnpairedCollator,
    prepare_unpaired_dataset,
    warn_of_balance,
)

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
ROW = {"prompt": "a", "completion": " b", "label": True}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def said(role, content):
    return {"role": role, "content": content}


CONVERSATIONS = [
    {"prompt": [said("user", f"What color is {what}?")], "completion": [said("assistant", color)], "label": good}
    for what, color, good in (("the sky", "blue", True), ("the sea", "green, of course", False), ("it", "42", True))
]
DATASETS = {
    "text": color_labels(11),
    "ends as it should": Dataset.from_list([{**ROW, "completion": f" b{EOS}"}, ROW, {**ROW, "prompt": ""}]),
    "messages": Dataset.from_list(CONVERSATIONS),
    "tools": Dataset.from_list([{**row, "tools": json.dumps(TOOLS)} for row in CONVERSATIONS]),
    "template arguments": Dataset.from_list(
        [{**row, "chat_template_kwargs": {"thinking": False}} for row in CONVERSATIONS]
    ),
    "pairs": color_pairs(7),
    "pairs with implicit prompts": color_pairs(7).map(
        lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}, remove_columns="prompt"
    ),
}


def trls(dataset, tokenizer, block, max_length, loss_type):
    """The dataset as TRL's trainer prepares it."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, per_device_train_batch_size=block)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=loss_type == "kto", **weights)
    return KTOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")


def ids(dataset):
    columns = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    return [{name: row[name] for name in columns if name in row} for row in dataset]


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS.keys())
@pytest.mark.parametrize(("block", "cut", "loss_type"), [(2, False, "kto"), (4, True, "kto"), (4, True, "apo")])
def test_rows_are_trls(dataset, block, cut, loss_type, tokenizer):
    lengths = sorted(len(row["prompt_ids"]) for row in prepare_unpaired_dataset(dataset, tokenizer))
    max_length = lengths[len(lengths) // 2] + 1 if cut else None
    expected = ids(trls(dataset, tokenizer, block, max_length, loss_type))
    options = {"max_length": max_length, "kl_batch_size": block if loss_type == "kto" else None}
    prepared = prepare_unpaired_dataset(dataset, tokenizer, **options)
    assert ids(prepared) == expected
    assert ids(prepare_unpaired_dataset(prepared, tokenizer, **options)) == expected
    assert ids(prepare_unpaired_dataset(dataset.to_iterable_dataset(), tokenizer, **options)) == expected


def test_mismatched_completions_stay_in_their_block(tokenizer):
    prepared = prepare_unpaired_dataset(color_labels(7), tokenizer, kl_batch_size=3)
    completions = prepared["completion_ids"]
    assert list(prepared["KL_completion_ids"]) == [completions[index] for index in (2, 0, 1, 5, 3, 4, 6)]


def test_blocks_do_not_depend_on_the_number_of_processes(tokenizer):
    one, two = (prepare_unpaired_dataset(color_labels(7), tokenizer, kl_batch_size=3, num_proc=n) for n in (None, 2))
    assert ids(one) == ids(two)


def test_older_limits(tokenizer):
    whole = prepare_unpaired_dataset(color_labels(5), tokenizer)
    limits = {"max_prompt_length": 3, "max_completion_length": 4}
    for row, cut in zip(
        whole, prepare_unpaired_dataset(color_labels(5), tokenizer, kl_batch_size=2, **limits), strict=True
    ):
        assert cut["prompt_ids"] == row["prompt_ids"][-3:] and cut["completion_ids"] == row["completion_ids"][:4]
        assert len(cut["KL_completion_ids"]) <= 4


BAD = {
    "no rows": (Dataset.from_dict({name: [] for name in ROW}), "no rows.*with a label"),
    "no label": (Dataset.from_list([{"prompt": "a", "completion": "b"}]), "no 'label'; expected.*True for good"),
    "no completion": (Dataset.from_list([{"prompt": "a", "text": "b", "label": True}]), "no 'completion'"),
    "words as labels": (Dataset.from_list([ROW | {"label": "True"}]), "row 0, column 'label': 'True' is no truth"),
    "other numbers": (Dataset.from_list([ROW | {"label": value} for value in (1, -1)]), "row 1.*-1 is no truth"),
    "a label missing": (Dataset.from_list([ROW, ROW | {"label": None}]), "row 1, column 'label': None"),
    "an empty completion": (Dataset.from_list([ROW, ROW | {"completion": ""}]), "row 1.*'completion'.*is empty"),
    "no messages": (Dataset.from_list([CONVERSATIONS[0] | {"completion": []}]), "row 0.*completion is empty"),
    "no prompt": (Dataset.from_list([CONVERSATIONS[0] | {"prompt": []}]), "row 0.*'prompt'.*no messages"),
    "numbers": (Dataset.from_list([ROW | {"completion": 3}]), "row 0.*'completion': 3 is of type int"),
    "both kinds": (Dataset.from_list([CONVERSATIONS[0] | {"prompt": "a"}]), "'prompt' is text.*both to be text"),
    "an empty side": (Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": ""}]), "row 0.*'rejected'.*empty"),
    "an image": (Dataset.from_list([ROW | {"image": "x"}]), "'image', but nothing reads images"),
    "no tokens": (
        Dataset.from_dict({"prompt_ids": [[1]] * 2, "completion_ids": [[2], []], "label": [True] * 2}),
        "row 1.*no tokens",
    ),
    "a bad label of tokens": (
        Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[2]], "label": [0.5]}),
        "row 0.*0.5 is no truth",
    ),
}


@pytest.mark.parametrize(("dataset", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data(dataset, message, tokenizer):
    with pytest.raises(ValueError, match=f"(?s)The train dataset.*{message}"):
        prepare_unpaired_dataset(dataset, tokenizer, kl_batch_size=2)


def test_a_text_needs_an_end(tokenizer):
    with pytest.raises(ValueError, match="eos_token=None"):
        prepare_unpaired_dataset(Dataset.from_list([ROW]), build_tokenizer(eos_token=None))


def labelled(good, bad):
    return Dataset.from_dict({"label": [True] * good + [False] * bad})


@pytest.mark.parametrize(
    ("good", "bad", "weights", "message"),
    [
        (5, 5, (3.0, 1.0), None),
        (15, 9, (1.0, 1.0), r"15 good and 9 bad.*\[0.6, 0.8\] or undesirable_weight in \[1.25, 1.67\]"),
        (15, 9, (0.7, 1.0), None),
        (15, 9, (1.0, 1.3), None),
        (300, 1000, (3.33, 1.0), None),
        (4, 0, (1.0, 1.0), "all 4 labels are True"),
        (0, 3, (1.0, 1.0), "all 3 labels are False"),
    ],
)
def test_balance(good, bad, weights, message, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_balance(labelled(good, bad), *weights)
    assert bool(caplog.records) == (message is not None)
    assert message is None or re.search(message, caplog.text)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_batches(layout, mode, tokenizer):
    """The rows' own sequences, those with the other completions, and both side by side."""
    rows = list(prepare_unpaired_dataset(color_labels(4), tokenizer, kl_batch_size=4))
    rows = [{**row, "ref_logps": -1.5, "ref_KL_logps": index} for index, row in enumerate(rows)]
    batch = UnpairedCollator(2, max_length=16, truncation_mode=mode, layout=layout).collate(rows)
    own, other, both = batch, batch[MISMATCHED], batch[BOTH]
    cut = slice(16) if mode == "keep_start" else slice(-16, None)
    for index, row in enumerate(rows):
        assert own.sequences()[index].tolist() == (row["prompt_ids"] + row["completion_ids"])[cut]
        assert other.sequences()[index].tolist() == (row["prompt_ids"] + row["KL_completion_ids"])[cut]
    pairs = both.sequences()
    for part, sequences in ((own, pairs[0::2]), (other, pairs[1::2])):
        assert all(map(torch.equal, part.sequences(), sequences))
    index = both.extras[OWN_TOKENS]
    assert torch.equal(both.targets[index], own.targets) and torch.equal(both.offset[index], own.offset)
    assert torch.equal(both.branch[index], 2 * own.branch)
    assert batch[LABEL].tolist() == [True] * 4 and batch["ref_KL_logps"].tolist() == [0, 1, 2, 3]
    moved = batch.to("meta")
    assert moved[BOTH].input_ids.is_meta and moved[MISMATCHED].targets.is_meta and moved[LABEL].is_meta


def test_a_batch_without_mismatched_completions(tokenizer):
    rows = list(prepare_unpaired_dataset(color_labels(2), tokenizer))
    batch = UnpairedCollator(2).collate(rows)
    assert BOTH not in batch and MISMATCHED not in batch
