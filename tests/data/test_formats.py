"""Rows of text and messages into token ids, as TRL's trainer makes them."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from trl import extract_prompt as trl_extract_prompt
from trl.data_utils import maybe_extract_prompt as trl_maybe_extract_prompt
from trl.trainer.dpo_trainer import DPOTrainer as TRLTrainer

from support.preferences import random_pairs
from support.tokenizer import EOS, build_tokenizer
from trl_fast.data import extract_prompt, is_conversational, maybe_extract_prompt, prepare_preference_dataset

TOKEN_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def message(role, content):
    return {"role": role, "content": content}


PLAIN = {
    "prompt": ["The sky is", "What color is the sea?", "The answer is "],
    "chosen": [" blue.", " It is green." + EOS, "42"],
    "rejected": [" green.", " It is blue", "not 42, the sky is green"],
}
PLAIN_IMPLICIT = {
    "chosen": ["The sky is blue.", "The sea is green" + EOS, "same start"],
    "rejected": ["The sky is green.", "The answer is 43", "same"],
}
CHAT = {
    "prompt": [
        [message("system", "Be nice."), message("user", "What color is the sky?")],
        [message("user", "The sea?"), message("assistant", "Green."), message("user", "Why?")],
    ],
    "chosen": [[message("assistant", "It is blue.")], [message("assistant", "The sky is blue")]],
    "rejected": [[message("assistant", "green")], [message("assistant", "No.")]],
}
CHAT_IMPLICIT = {
    column: [prompt + completion for prompt, completion in zip(CHAT["prompt"], CHAT[column], strict=True)]
    for column in ("chosen", "rejected")
}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"color": "string"}}}]


def prepare_with_trl(dataset, tokenizer, max_length=None, truncation_mode="keep_start"):
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation_mode)
    return TRLTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")


def token_rows(dataset):
    return [{column: row[column] for column in TOKEN_COLUMNS} for row in dataset]


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("columns", [PLAIN, PLAIN_IMPLICIT, CHAT, CHAT_IMPLICIT])
def test_token_ids_equal_trls(columns, add_bos):
    tokenizer = build_tokenizer(add_bos=add_bos)
    dataset = Dataset.from_dict(columns)
    ours = prepare_preference_dataset(dataset, tokenizer, max_length=1000)
    assert token_rows(ours) == token_rows(prepare_with_trl(dataset, tokenizer, max_length=1000))
    assert "prompt" in ours.column_names


def test_text_gets_special_tokens_once_and_eos_once():
    tokenizer = build_tokenizer(add_bos=True)
    rows = token_rows(prepare_preference_dataset(Dataset.from_dict(PLAIN), tokenizer))
    for row in rows:
        whole = row["prompt_ids"] + row["chosen_ids"]
        assert whole[0] == tokenizer.bos_token_id
        assert whole.count(tokenizer.bos_token_id) == 1
        assert whole[-1] == tokenizer.eos_token_id
        assert whole.count(tokenizer.eos_token_id) == 1
    chat = token_rows(prepare_preference_dataset(Dataset.from_dict(CHAT), tokenizer))
    assert tokenizer.bos_token_id not in chat[0]["prompt_ids"]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_template_arguments_equal_trls(tools, caplog):
    tokenizer = build_tokenizer()
    dataset = Dataset.from_dict({**CHAT, "tools": [tools] * 2, "chat_template_kwargs": [{"thinking": False}] * 2})
    ours = token_rows(prepare_preference_dataset(dataset, tokenizer))
    assert ours == token_rows(prepare_with_trl(dataset, tokenizer))
    assert "look_up" in tokenizer.decode(ours[0]["prompt_ids"])
    # the template's generation prompt ends in an empty thought that whole conversations do not have
    assert "think" not in tokenizer.decode(ours[0]["prompt_ids"])
    warnings = [record.message for record in caplog.records if record.name == "trl_fast.data.tokenization"]
    assert len(warnings) == 1
    assert "<think></think>" in warnings[0]


def test_template_arguments_may_be_missing_in_a_row():
    tokenizer = build_tokenizer()
    dataset = Dataset.from_dict({**CHAT, "chat_template_kwargs": [{"thinking": True}, None]})
    without = Dataset.from_dict(CHAT)
    assert token_rows(prepare_preference_dataset(dataset, tokenizer)) == token_rows(
        prepare_preference_dataset(without, tokenizer)
    )


@pytest.mark.parametrize("chosen, rejected", [("ue", "ack"), ("!", "ue"), ("ue", "!")])
def test_completion_starts_where_tokens_first_merge_over_the_boundary(chosen, rejected):
    tokenizer = build_tokenizer()
    dataset = Dataset.from_dict({"prompt": ["The sky is bl"], "chosen": [chosen], "rejected": [rejected]})
    row = prepare_preference_dataset(dataset, tokenizer)[0]
    assert token_rows([row]) == token_rows(prepare_with_trl(dataset, tokenizer))
    assert tokenizer.decode(row["prompt_ids"]) == "The sky is"
    assert tokenizer.decode(row["chosen_ids"]) == " bl" + chosen + EOS
    assert tokenizer.decode(row["rejected_ids"]) == " bl" + rejected + EOS


@pytest.mark.parametrize("truncation_mode, kept", [("keep_start", [0, 2]), ("keep_end", [0, 1, 2])])
def test_rows_without_room_for_a_completion_are_dropped_as_by_trl(truncation_mode, kept):
    tokenizer = build_tokenizer()
    dataset = Dataset.from_dict({**PLAIN, "row": [0, 1, 2]})
    lengths = [len(tokenizer(text)["input_ids"]) for text in PLAIN["prompt"]]
    options = dict(max_length=lengths[1], truncation_mode=truncation_mode)
    assert lengths[1] > max(lengths[0], lengths[2])
    ours = prepare_preference_dataset(dataset, tokenizer, **options)
    assert ours["row"][:] == prepare_with_trl(dataset, tokenizer, **options)["row"][:] == kept


@pytest.mark.parametrize("columns", [PLAIN, CHAT_IMPLICIT])
def test_streams_equal_datasets(columns):
    tokenizer = build_tokenizer()
    dataset = Dataset.from_dict(columns)
    stream = prepare_preference_dataset(dataset.to_iterable_dataset(), tokenizer, max_length=500)
    assert isinstance(stream, IterableDataset)
    assert token_rows(stream) == token_rows(prepare_preference_dataset(dataset, tokenizer, max_length=500))


def test_worker_processes_give_the_same_rows():
    tokenizer = build_tokenizer()
    dataset = Dataset.from_dict(PLAIN)
    assert token_rows(prepare_preference_dataset(dataset, tokenizer, num_proc=2)) == token_rows(
        prepare_preference_dataset(dataset, tokenizer)
    )


def test_tokenized_datasets_pass_through():
    tokenizer = build_tokenizer()
    rows = random_pairs(5, longest=6)
    dataset = Dataset.from_list(rows)
    assert list(prepare_preference_dataset(dataset, tokenizer)) == rows
    once = prepare_preference_dataset(Dataset.from_dict(PLAIN), tokenizer, max_length=100)
    # text that would come out otherwise shows that a second pass does not tokenize again
    touched = once.remove_columns("chosen").add_column("chosen", ["x"] * 3)
    assert token_rows(prepare_preference_dataset(touched, tokenizer, max_length=100)) == token_rows(once)


def test_a_longer_prompt_keeps_its_end_under_max_prompt_length():
    tokenizer = build_tokenizer()
    plain = token_rows(prepare_preference_dataset(Dataset.from_dict(PLAIN), tokenizer))
    short = token_rows(prepare_preference_dataset(Dataset.from_dict(PLAIN), tokenizer, max_prompt_length=2))
    for before, after in zip(plain, short, strict=True):
        assert after == {**before, "prompt_ids": before["prompt_ids"][-2:]}
    # the limit comes before the one on the whole: no prompt fills max_length any more
    kept = prepare_preference_dataset(Dataset.from_dict(PLAIN), tokenizer, max_prompt_length=2, max_length=3)
    assert len(kept) == 3


def test_prepared_rows_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    rows = Dataset.from_dict(PLAIN)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_tokenizer()

    def prepare(**options):
        dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        return prepare_preference_dataset(dataset, build_tokenizer(), **options)

    first = prepare(max_length=100)
    assert first.cache_files
    monkeypatch.setattr("trl_fast.data.preference.tokenize_completions", lambda *_: pytest.fail("tokenized again"))
    second = prepare(max_length=100)
    assert second._fingerprint == first._fingerprint
    assert token_rows(second) == token_rows(first)
    monkeypatch.undo()
    assert prepare(max_length=len(tokenizer(PLAIN["prompt"][1])["input_ids"]))._fingerprint != first._fingerprint


@pytest.mark.parametrize(
    "example",
    [
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        {"chosen": "bluish", "rejected": "black"},
        {"chosen": "same", "rejected": "same and more"},
        {"chosen": "same", "rejected": "same"},
        {"chosen": CHAT_IMPLICIT["chosen"][0], "rejected": CHAT_IMPLICIT["rejected"][0]},
        {"chosen": CHAT_IMPLICIT["chosen"][0], "rejected": CHAT_IMPLICIT["chosen"][0]},
        {"chosen": CHAT_IMPLICIT["chosen"][0][:2], "rejected": CHAT_IMPLICIT["chosen"][0]},
    ],
)
def test_extract_prompt_equals_trls(example):
    assert extract_prompt(example) == trl_extract_prompt(example)


def test_extract_prompt_where_trl_goes_wrong():
    # nothing shared, and chosen ends in a space: TRL takes that for a space before the difference
    assert extract_prompt({"chosen": "yes ", "rejected": "no"}) == {"prompt": "", "chosen": "yes ", "rejected": "no"}


@pytest.mark.parametrize(
    "example",
    [
        {
            "prompt": "What color is the sky?",
            "chosen": CHAT_IMPLICIT["chosen"][0],
            "rejected": CHAT_IMPLICIT["rejected"][0],
        },
        {"prompt": "The sky", "chosen": " is blue", "rejected": " is green"},
        {"prompt": CHAT["prompt"][0], "chosen": CHAT["chosen"][0], "rejected": CHAT["rejected"][0]},
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        {"text": "neither"},
    ],
)
def test_maybe_extract_prompt_equals_trls(example):
    assert maybe_extract_prompt(example) == trl_maybe_extract_prompt(example)


def test_text_prompt_beside_whole_conversations_is_taken_from_the_conversations():
    tokenizer = build_tokenizer()
    beside = Dataset.from_dict({"prompt": ["the sky?", "why?"], **CHAT_IMPLICIT})
    assert token_rows(prepare_preference_dataset(beside, tokenizer)) == token_rows(
        prepare_preference_dataset(Dataset.from_dict(CHAT), tokenizer)
    )


def test_is_conversational():
    assert is_conversational({"prompt": [message("user", "hi")]})
    assert is_conversational({"messages": [{"role": "user"}]})
    assert not is_conversational({"prompt": "hi"})
    assert not is_conversational({"prompt": []})
    assert not is_conversational({"chosen": [{"from": "user", "value": "hi"}]})
    assert not is_conversational({"text": [message("user", "hi")]})
