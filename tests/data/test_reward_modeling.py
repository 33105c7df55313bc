"""Data for reward models: the same token ids, rows and tensors as TRL's, and bad data met by name."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from support.tokenizer import EOS, build_tokenizer
from trl_fast.data.packing import LAYOUTS
from trl_fast.data.reward_modeling import (
    DataCollatorForReward,
    RewardCollator,
    prepare_reward_dataset,
    reward_batch,
)

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def said(role, content):
    return {"role": role, "content": content}


TEXT = [
    {"prompt": "The sky", "chosen": " is blue", "rejected": " is green."},
    {"prompt": "", "chosen": "It is", "rejected": ""},
    {"prompt": "The sea is", "chosen": f" green{EOS}", "rejected": f" blue{EOS}{EOS}"},
]
CONVERSATIONS = [
    {
        "prompt": [said("system", "Be brief."), said("user", f"What color is {what}?")],
        "chosen": [said("assistant", "blue")],
        "rejected": [said("assistant", "green, of course")],
    }
    for what in ("the sky", "the sea")
]
ROWS = {
    "text": TEXT,
    "implicit prompt": [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in TEXT],
    "messages": CONVERSATIONS,
    "messages with their prompt": [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CONVERSATIONS
    ],
    "tools": [{**row, "tools": json.dumps(TOOLS)} for row in CONVERSATIONS],
    "no tools": [{**row, "tools": None} for row in CONVERSATIONS],
    "template arguments": [
        {**row, "chat_template_kwargs": {"thinking": False, "add_generation_prompt": True}} for row in CONVERSATIONS
    ],
    "margins": [{**row, "margin": index / 2} for index, row in enumerate(TEXT)],
    "tokenized": [{"chosen_ids": [5, 6, 7], "rejected_ids": [5]}, {"chosen_ids": [8], "rejected_ids": [9] * 30}],
}


def trls(dataset, tokenizer, max_length=None):
    """The dataset as TRL's trainer prepares it."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    return RewardTrainer._prepare_dataset(None, dataset, tokenizer, args, "train")


def ids(dataset):
    columns = ("chosen_ids", "rejected_ids", "margin")
    return [{name: row[name] for name in columns if name in row} for row in dataset]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("max_length", [None, 16])
@pytest.mark.parametrize("add_bos", [False, True])
def test_rows_are_those_of_trl(rows, max_length, add_bos):
    tokenizer = build_tokenizer(add_bos=add_bos)
    dataset = Dataset.from_list(rows)
    expected = ids(trls(dataset, tokenizer, max_length))
    if not expected:
        with pytest.raises(ValueError, match=f"(?s)train dataset is empty.*max_length={max_length}"):
            prepare_reward_dataset(dataset, tokenizer, max_length=max_length)
        return
    ours = prepare_reward_dataset(dataset, tokenizer, max_length=max_length)
    assert ids(ours) == expected
    assert ids(prepare_reward_dataset(ours, tokenizer, max_length=max_length)) == expected
    stream = prepare_reward_dataset(dataset.to_iterable_dataset(), tokenizer, max_length=max_length)
    assert ids(stream) == expected


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def test_older_column_names(tokenizer):
    dataset = Dataset.from_dict({"chosen_input_ids": [[5, 6]], "rejected_input_ids": [[7]]})
    with pytest.warns(FutureWarning, match="chosen_input_ids"):
        ours = prepare_reward_dataset(dataset, tokenizer)
    with pytest.warns(FutureWarning):
        assert ids(ours) == ids(trls(dataset, tokenizer))


def test_column_names_of_the_oldest_versions(tokenizer):
    row = {"input_ids_chosen": [5, 6, 0], "attention_mask_chosen": [1, 1, 0]}
    row |= {"input_ids_rejected": [7], "attention_mask_rejected": [1]}
    with pytest.warns(FutureWarning, match="`input_ids_chosen` and `input_ids_rejected` are names of an older TRL"):
        ours = prepare_reward_dataset(Dataset.from_list([row]), tokenizer)
    assert ours[:] == {"chosen_ids": [[5, 6]], "rejected_ids": [[7]]}


def test_a_question_repeated_as_text_beside_conversations_is_ignored(tokenizer):
    whole = ROWS["messages with their prompt"]
    dataset = Dataset.from_list([{**row, "prompt": "What color is it?"} for row in whole])
    expected = ids(prepare_reward_dataset(Dataset.from_list(whole), tokenizer))
    assert ids(prepare_reward_dataset(dataset, tokenizer)) == expected


def test_rows_left_out_are_counted(tokenizer, caplog):
    dataset = Dataset.from_list(ROWS["tokenized"])
    with caplog.at_level(logging.WARNING):
        assert len(prepare_reward_dataset(dataset, tokenizer, max_length=3)) == 1
    assert "1 of 2 rows are left out" in caplog.text and "max_length=3" in caplog.text


ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}
BAD = {
    "other columns": ([{"prompt": "a", "completion": "b"}], "'chosen' and 'rejected'.*chosen_ids, rejected_ids"),
    "both sides empty": ([ROW, {**ROW, "chosen": "", "rejected": ""}], "row 1, column 'chosen': .*empty"),
    "missing text": ([ROW, {**ROW, "rejected": None}], "row 1, column 'rejected': None"),
    "text and messages": ([{**ROW, "prompt": [said("user", "a")]}], "row 0: .*'prompt' is messages"),
    "no preference": ([{**ROW, "rejected": " b"}] * 2, "'chosen' equals 'rejected' in all 2 rows"),
    "images": ([{**ROW, "images": [1]}], "'images', but nothing reads images"),
    "missing margin": ([{**ROW, "margin": 1.0}, {**ROW, "margin": None}], "row 1, column 'margin': .*None"),
    "margin of text": ([{**ROW, "margin": "large"}], "row 0, column 'margin': .*'large'"),
    "tokenized, empty": ([{"chosen_ids": [1], "rejected_ids": []}], "row 0, column 'rejected_ids': .*no tokens"),
    "tokenized, margin": (
        [{"chosen_ids": [1], "rejected_ids": [2], "margin": float("nan")}],
        "row 0, column 'margin': .*nan",
    ),
    "tokenized for DPO": ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], "'prompt_ids' beside"),
}


@pytest.mark.parametrize("rows, message", BAD.values(), ids=BAD.keys())
def test_bad_data_is_named(rows, message, tokenizer):
    with pytest.raises(ValueError, match=f"(?s)The test dataset.*{message}"):
        prepare_reward_dataset(Dataset.from_list(rows), tokenizer, name="test")


def test_bad_data_in_a_stream_is_named_when_it_is_read(tokenizer):
    rows = [{**ROW, "margin": 1.0}, {**ROW, "margin": None}]
    stream = prepare_reward_dataset(Dataset.from_list(rows).to_iterable_dataset(), tokenizer)
    with pytest.raises(ValueError, match="row 1, column 'margin'"):
        list(stream)


def test_text_without_an_end_token(tokenizer):
    with pytest.raises(ValueError, match="eos_token=None"):
        prepare_reward_dataset(Dataset.from_list([ROW]), build_tokenizer(eos_token=None))
    prepare_reward_dataset(Dataset.from_list(CONVERSATIONS), build_tokenizer(eos_token=None))


PAIRS = [
    {"chosen_ids": [5, 6, 7], "rejected_ids": [8, 9], "margin": 0.5},
    {"chosen_ids": [4], "rejected_ids": [3, 2, 2], "margin": 0},
]
WITHOUT_MARGIN = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in PAIRS]


@pytest.mark.parametrize("rows", [PAIRS, WITHOUT_MARGIN], ids=["margins", "no margins"])
@pytest.mark.parametrize("multiple", [None, 4])
def test_the_collator_gives_the_tensors_of_trls(rows, multiple):
    ours = DataCollatorForReward(pad_token_id=2, pad_to_multiple_of=multiple)(rows)
    theirs = DataCollatorForPreference(pad_token_id=2, pad_to_multiple_of=multiple)(rows)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype


PROMPT = [*range(10, 30)]
# A pad token of a sequence's own at its end, sequences of nothing else, one that begins with the whole other one, and
# the same twice.
SEQUENCES = [
    ([5, 6, 7], [8, 9]),
    ([4], [3, 2, 2]),
    ([2, 2], [2, 5, 2]),
    (PROMPT + [7, 2], PROMPT + [8]),
    (PROMPT, PROMPT + [2, 2]),
    (PROMPT + [9], PROMPT + [9]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewards_are_read_where_transformers_reads_them(layout):
    batch = reward_batch(SEQUENCES, layout, 2)
    read = batch.input_ids.flatten()[batch["reward_positions"]]
    assert read.tolist() == [7, 9, 4, 3, 2, 5, 7, 8, 29, 29, 9, 9]
    sequences = [ids for pair in SEQUENCES for ids in pair]
    assert [ids.tolist() for ids in batch.sequences()] == sequences
    assert batch.num_tokens == sum(map(len, sequences))
    assert batch.input_ids.numel() == {"shared_prefix": 80, "packed": 141, "padded": 12 * 22}[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_collators_batch_is_converted(layout):
    collator = RewardCollator(0, layout)
    converted = collator.token_batch(DataCollatorForPreference(pad_token_id=0)(PAIRS))
    own = collator.collate(PAIRS)
    for name in ("input_ids", "position_ids", "reward_positions", "margin"):
        assert torch.equal(converted[name], own[name])
    assert converted.sequence_lengths == own.sequence_lengths
    with pytest.raises(ValueError, match="'labels', which the loss does not read"):
        collator.token_batch({"input_ids": None, "attention_mask": None, "labels": None})
    with pytest.raises(ValueError, match="has 3 rows; expected those of all chosen"):
        collator.token_batch({name: torch.ones(3, 1) for name in ("input_ids", "attention_mask")})


def test_padding_to_a_multiple():
    batch = RewardCollator(0, "padded", 8).collate(WITHOUT_MARGIN)
    assert batch.input_ids.shape == (4, 8) and "margin" not in batch
    assert batch["reward_positions"].tolist() == [2, 9, 16, 26]
