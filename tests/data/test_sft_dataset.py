"""Rows to token ids and labels: against TRL's preparation, and what is said about bad or cut rows."""

import re
from dataclasses import replace

import pytest
import trl
from datasets import Dataset

from support.models import save_tiny_model
from support.supervised import ROWS, sft_rows
from support.tokenizer import build_tokenizer
from trl_fast.data import SFTFormat, SFTLength, get_training_chat_template, prepare_sft_dataset, tokenize_sft

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    path = save_tiny_model(folder / "model", build_tokenizer())
    return trl.SFTTrainer(path, trl.SFTConfig(str(folder), **CPU), train_dataset=sft_rows("text", 2))


def prepared_by_trl(trainer, dataset, tokenizer, how, length, **settings):
    """Returns the dataset as TRL's trainer prepares it under the same settings."""
    packing = length.packing_strategy is not None
    args = trl.SFTConfig(
        "unused",
        dataset_text_field=how.text_field,
        assistant_only_loss=how.assistant_only_loss,
        max_length=length.max_length,
        truncation_mode=length.truncation_mode,
        packing_strategy=length.packing_strategy or "bfd",
        **CPU,
        **settings,
    )
    trainer._tokenizer = trainer.processing_class = tokenizer
    trainer.completion_only_loss, trainer.chat_template = how.completion_only_loss, how.chat_template
    return trainer._prepare_dataset(dataset, tokenizer, args, packing, None, "train")


def columns(dataset):
    rows = list(dataset)
    return [{name: row[name] for name in ("input_ids", "labels", "seq_lengths") if name in row} for row in rows]


TEXT_FIELDS = {"story": "story"}
LENGTHS = {
    "no limit": SFTLength(None),
    "cut": SFTLength(26),
    "cut at the start": SFTLength(14, "keep_end"),
    "bfd": SFTLength(24, packing_strategy="bfd"),
    "bfd_split": SFTLength(24, packing_strategy="bfd_split"),
    "wrapped": SFTLength(24, packing_strategy="wrapped"),
}


WITH_COMPLETIONS = [kind for kind in ROWS if "completion" in kind or kind in ("tools as JSON", "template arguments")]


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_prepares_every_kind_as_trl_does(kind, completion_only, trl_trainer):
    if completion_only and kind not in WITH_COMPLETIONS:
        pytest.skip("has no completions")
    tokenizer, dataset = build_tokenizer(add_bos=completion_only), sft_rows(kind, 6)
    how = SFTFormat(TEXT_FIELDS.get(kind, "text"), completion_only)
    # The prompt that describes a tool is longer than that.
    length = LENGTHS["no limit" if "tools" in kind else "cut"]
    ours = prepare_sft_dataset(dataset, tokenizer, how, length)
    assert columns(ours) == columns(prepared_by_trl(trl_trainer, dataset, tokenizer, how, length))


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("kind", ["text", "prompt and completion"])
def test_cuts_and_packs_as_trl_does(kind, length, trl_trainer):
    tokenizer, dataset, how = build_tokenizer(), sft_rows(kind, 12), SFTFormat("text", kind != "text")
    ours = prepare_sft_dataset(dataset, tokenizer, how, length)
    assert columns(ours) == columns(prepared_by_trl(trl_trainer, dataset, tokenizer, how, length))
    stream = prepare_sft_dataset(dataset.to_iterable_dataset(), tokenizer, how, length)
    assert columns(stream) == columns(ours)


@pytest.mark.parametrize("name", ["cut", "bfd", "wrapped"])
def test_shuffles_as_trl_does(name, trl_trainer):
    tokenizer, dataset, how, length = build_tokenizer(), sft_rows("text", 8), SFTFormat(), LENGTHS[name]
    theirs = prepared_by_trl(trl_trainer, dataset, tokenizer, how, length, shuffle_dataset=True, seed=5)
    assert columns(prepare_sft_dataset(dataset, tokenizer, how, length, shuffle_seed=5)) == columns(theirs)


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", ["messages", "prompt and completion messages"])
def test_what_the_assistant_says_as_trl_sees_it(family, kind, trl_trainer):
    tokenizer, dataset, length = build_tokenizer(), sft_rows(kind, 4), SFTLength(None)
    tokenizer.chat_template = getattr(trl.chat_template_utils, f"{family}_chat_template")
    how = SFTFormat("text", kind != "messages", True, get_training_chat_template(tokenizer))
    ours = columns(prepare_sft_dataset(dataset, tokenizer, how, length))
    how = replace(how, chat_template=trl.get_training_chat_template(tokenizer))
    assert ours == columns(prepared_by_trl(trl_trainer, dataset, tokenizer, how, length))
    assert "It is blue 0" in tokenizer.decode([token for token in ours[0]["labels"] if token != -100])


def test_a_completion_is_learned_from_where_it_departs_from_the_prompt():
    tokenizer = build_tokenizer()
    row = tokenize_sft(
        {"prompt": "The sky", "completion": " is blue."}, tokenizer, SFTFormat(completion_only_loss=True)
    )
    assert tokenizer.decode(row["input_ids"]) == "The sky is blue.<|im_end|>"
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == " is blue.<|im_end|>"


def test_the_end_token_is_not_doubled():
    tokenizer = build_tokenizer()
    ended, plain = ({"text": f"The sky{end}"} for end in ("<|im_end|>", ""))
    assert tokenize_sft(ended, tokenizer, SFTFormat()) == tokenize_sft(plain, tokenizer, SFTFormat())


def test_a_pair_of_prompt_and_completion_comes_before_other_columns():
    """TRL fails where a prompt of text stands beside whole conversations; there the conversations count."""
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    dataset = Dataset.from_list([{"prompt": "Hi", "messages": messages}])
    [row] = prepare_sft_dataset(dataset, tokenizer, SFTFormat(), SFTLength())
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]


def test_formatting_func_replaces_what_a_row_had():
    dataset = sft_rows("messages", 3)
    prepared = prepare_sft_dataset(
        dataset, build_tokenizer(), SFTFormat(), SFTLength(), formatting_func=lambda row: row["messages"][0]["content"]
    )
    tokenizer = build_tokenizer()
    assert tokenizer.decode(prepared[1]["input_ids"]) == "What color is 1?<|im_end|>"
    with pytest.raises(TypeError, match="row 0: formatting_func returned list; expected a string"):
        prepare_sft_dataset(dataset, tokenizer, SFTFormat(), SFTLength(), formatting_func=lambda row: ["a"])


def test_a_packed_dataset_is_left_alone():
    packed = prepare_sft_dataset(sft_rows("text"), build_tokenizer(), SFTFormat(), LENGTHS["bfd"])
    assert prepare_sft_dataset(packed, build_tokenizer(), SFTFormat(), LENGTHS["bfd"]) is packed


def tokens_of(*lengths, masked=()):
    rows = [list(range(10, 10 + length)) for length in lengths]
    labels = [[-100] * len(row) if index in masked else row for index, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


CUT = {
    "cut": (SFTLength(4), "2 of 3 rows are longer than max_length=4.*'keep_start' cuts 5 of 15 tokens off"),
    "bfd": (SFTLength(4, packing_strategy="bfd"), "2 of 3 .*'bfd' cuts 5 of 15 tokens.*'bfd_split' would keep them"),
    "bfd_split": (SFTLength(4, packing_strategy="bfd_split"), "2 of 3 rows .* are split into pieces"),
}


@pytest.mark.parametrize(("length", "message"), CUT.values(), ids=CUT.keys())
def test_what_is_cut_is_counted(length, message, caplog):
    prepare_sft_dataset(tokens_of(6, 2, 7), build_tokenizer(), SFTFormat(), length)
    assert len(caplog.records) == 1
    caplog.clear()
    prepare_sft_dataset(tokens_of(4, 2, 1), build_tokenizer(), SFTFormat(), length)
    assert not caplog.records
    prepare_sft_dataset(tokens_of(6, 2, 7), build_tokenizer(), SFTFormat(), length)
    assert re.search(message, caplog.records[0].message)


def test_rows_that_teach_nothing_are_dropped_and_counted(caplog):
    dataset = tokens_of(3, 4, 5, masked=[1])
    prepared = prepare_sft_dataset(dataset, build_tokenizer(), SFTFormat(), SFTLength(8))
    assert len(prepared) == 2 and "1 of 3 rows have no token to learn" in caplog.text
    with pytest.raises(ValueError, match="train dataset is empty.*max_length=8.*'keep_start'"):
        prepare_sft_dataset(tokens_of(3, masked=[0]), build_tokenizer(), SFTFormat(), SFTLength(8))


def test_a_mask_that_does_not_count_is_said_so(caplog):
    prepare_sft_dataset(sft_rows("tokens and completions"), build_tokenizer(), SFTFormat(), SFTLength())
    assert "completion_mask is ignored" in caplog.text and "completion_only_loss=True" in caplog.text


USER = {"role": "user", "content": "Hi"}
BAD_ROWS = {
    "no known column": (
        [{"question": "a", "answer": "b"}],
        r"\['question', 'answer'\]; expected 'text'.*rename_column",
    ),
    "preference pairs": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference pairs.*DPOTrainer"),
    "an image": ([{"text": "a", "image": "b"}], "column 'image', but nothing reads images"),
    "no text": ([{"text": "a"}, {"text": None}], "row 1, column 'text': None is of type NoneType.*expected a string"),
    "numbers": ([{"text": 3}], "row 0, column 'text': 3 is of type int"),
    "no messages": ([{"messages": [USER]}, {"messages": []}], "row 1, column 'messages'.*'role': 'user'"),
    "messages without roles": ([{"messages": [{"content": "Hi"}]}], "row 0, column 'messages'"),
    "mixed": ([{"prompt": "a", "completion": [USER]}], "row 0: 'prompt' is text, 'completion' is messages"),
    "too few labels": ([{"input_ids": [1, 2], "labels": [1]}], "row 0: 'labels' has 1 elements, 'input_ids' 2"),
    "too short a mask": (
        [{"input_ids": [1, 2], "assistant_masks": [1]}],
        "row 0: column 'assistant_masks' has 1 elements, 'input_ids' 2",
    ),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=f"The train dataset.*{message}"):
        prepare_sft_dataset(Dataset.from_list(rows), build_tokenizer(), SFTFormat(), SFTLength())
    stream = Dataset.from_list(rows).to_iterable_dataset()
    if "labels" not in rows[0]:
        with pytest.raises(ValueError, match=f"The train dataset.*{message}"):
            list(prepare_sft_dataset(stream, build_tokenizer(), SFTFormat(), SFTLength()))


def test_no_rows_and_rows_made_as_they_are_read():
    for dataset, message in [
        (Dataset.from_dict({"text": []}), "no rows"),
        (sft_rows("text").with_transform(lambda batch: batch), "with_transform.*skip_prepare_dataset"),
    ]:
        with pytest.raises(ValueError, match=f"The test dataset.*{message}"):
            prepare_sft_dataset(dataset, build_tokenizer(), SFTFormat(), SFTLength(), name="test")


def test_a_row_without_the_assistant_and_a_template_that_refuses():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    how = SFTFormat(assistant_only_loss=True)
    said = {"messages": [USER, {"role": "assistant", "content": "Yes"}]}
    with pytest.raises(ValueError, match="row 1: assistant_only_loss=True, but no token"):
        prepare_sft_dataset(Dataset.from_list([said, {"messages": [USER]}]), tokenizer, how, SFTLength())
    system = {"messages": [{"role": "system", "content": "Be short."}]}
    with pytest.raises(ValueError, match="row 0: the chat template refuses the messages: no system"):
        prepare_sft_dataset(Dataset.from_list([system]), tokenizer, how, SFTLength())


def test_text_needs_an_end_token():
    with pytest.raises(ValueError, match="eos_token=None"):
        prepare_sft_dataset(sft_rows("text"), build_tokenizer(eos_token=None), SFTFormat(), SFTLength())


def test_lengths_that_make_no_sense():
    with pytest.raises(ValueError, match="truncation_mode='middle'"):
        SFTLength(4, "middle")
    with pytest.raises(ValueError, match="max_length is None"):
        SFTLength(None, packing_strategy="bfd")
