"""Data files that are malformed, cut off, empty, binary or wrongly typed: one line with file and row, and status 2."""

import pytest

from trl_fast.cli import training
from trl_fast.cli.main import main

# The file, and what the line has to name besides.
UNREADABLE = {
    "comma.jsonl": ["line 4, column 16", "no valid JSON", "',' delimiter"],
    "single_quotes.jsonl": ["line 3, column 2", "double quotes"],
    "cut.jsonl": ["line 8", "Unterminated string"],
    "word.jsonl": ["line 5, column 1", "no valid JSON"],
    "nan_word.jsonl": ["line 2, column 12", "no valid JSON"],
    "not_rows.jsonl": ["line 3", "expected an object", "got list"],
    "list_of_rows.json": ["line 1", "no valid JSON"],
    "number.json": ["line 1", "expected an object", "got int"],
    "words.json": ["line 1, column 1", "no valid JSON"],
    "binary.jsonl": ["line 1", "zero byte"],
    "zeros.jsonl": ["line 1", "zero byte"],
    "utf16.jsonl": ["is UTF-16; save it as UTF-8"],
    "latin1.jsonl": ["line 3: byte 0xe9 is no UTF-8", "save the file as UTF-8"],
    "empty.jsonl": ["is empty"],
    "empty.json": ["is empty"],
    "empty_list.json": ["split 'train' has no rows"],
    "blank.jsonl": ["split 'train' has no rows"],
    "empty.csv": ["is empty"],
    "header.csv": ["split 'train' has no rows"],
    "fields.csv": ["no valid CSV", "Expected 3 fields in line 3, saw 5"],
    "quote.csv": ["no valid CSV", "EOF inside string starting at row 2"],
    "binary.csv": ["line 1", "zero byte"],
    "utf16.csv": ["is UTF-16; save it as UTF-8"],
    "text.parquet": ["no valid Parquet", "magic bytes"],
    "empty.parquet": ["is empty"],
    "cut.parquet": ["no valid Parquet", "magic bytes"],
    "binary.parquet": ["no valid Parquet"],
    "text.arrow": ["no valid Arrow"],
    "empty.arrow": ["is empty"],
    "cut.arrow": ["no valid Arrow"],
    "text2.jsonl.gz": ["ends in .gz", "not compressed"],
    "cut.jsonl.gz": ["cannot be read to its end"],
    "comma.jsonl.gz": ["line 4, column 16", "no valid JSON"],
    "pairs.txt": ["expected a file ending in .jsonl, .json, .csv, .parquet, .arrow"],
    "pairs.xlsx": ["expected a file ending in .jsonl"],
    "noending": ["expected a file ending in .jsonl"],
    "empty_folder": ["dataset_name", "any data files"],
    "folder.jsonl": ["dataset_name", "any data files"],
    "mixed": ["mixes file formats ['json', 'parquet']", "keep one"],
    "saved": ["was written by save_to_disk", "to_parquet"],
    "nothing.jsonl": ["there is no such file"],
    "nothing": ["dataset_name", "any data file"],
}
DPO, SFT, KTO = (f"{method} --model_name_or_path {{model}} RUN" for method in ("dpo", "sft", "kto"))
REWARD = "reward --model_name_or_path {reward} RUN"
GRPO = (
    "grpo --model_name_or_path {model} RUN --num_generations 2 --max_completion_length 9 "
    "--reward_funcs think_format_reward"
)
PPO = "ppo --reward_model_path {reward} --model_name_or_path {model} RUN"


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read(name, refused):
    refused(f"{DPO} --dataset_name {{data}}/{name}", f"{{data}}/{name}", *UNREADABLE[name])


@pytest.mark.parametrize("name", ["comma.jsonl", "fields.csv", "cut.parquet", "empty.jsonl", "utf16.csv"])
def test_streams_validate_and_each_command_say_the_same(name, refused):
    line = refused(f"{DPO} --dataset_name {{data}}/{name}").partition(": ")[2]
    assert refused(f"{DPO} --dataset_name {{data}}/{name} --dataset_streaming").partition(": ")[2] == line
    assert refused(f"validate --dataset_name {{data}}/{name}").partition(": ")[2] == line
    for command in ("sft", "kto", "reward", "ppo --reward_model_path {reward}"):
        name_or_path = "--model_name_or_path {model} RUN"
        assert refused(f"{command} {name_or_path} --dataset_name {{data}}/{name}").partition(": ")[2] == line


@pytest.mark.parametrize(
    "name", ["pairs.arrow", "text.jsonl.gz", "gzip.jsonl", "bom.jsonl", "pairs.csv", "pairs.parquet"]
)
def test_whole_files_of_every_format_are_trained_on(name, places, monkeypatch, tmp_path):
    rows = []
    monkeypatch.setattr(training, "train", lambda trainer, *rest, **keywords: rows.append(len(trainer.train_dataset)))
    flags = "--per_device_train_batch_size 2 --max_steps 1 --use_cpu true --bf16 false --report_to none"
    paths = ["--model_name_or_path", places["model"], "--dataset_name", f"{places['data']}/{name}"]
    main(["dpo", *paths, "--output_dir", str(tmp_path), *flags.split()])
    assert rows == [8]


# A command, the file, and what the line has to name besides the file.
ROWS = [
    (DPO, "type.jsonl", ["row 5, column 'chosen'", "7", "expected a string"]),
    (DPO, "list.jsonl", ["row 5, column 'chosen'", "['a']"]),
    (DPO, "null.jsonl", ["row 5, column 'chosen'", "None", "expected a string"]),
    (DPO, "all_numbers.jsonl", ["row 0, column 'chosen'", "1 is of type int"]),
    (DPO, "empty_text.jsonl", ["row 5, column 'chosen'", "is empty", "dataset.filter"]),
    (DPO, "columns.jsonl", ["['prompt', 'chosen']", "expected 'chosen' and 'rejected'", "rename_column"]),
    (DPO, "misspelt.jsonl", ["'choosen'", "expected 'chosen' and 'rejected'"]),
    (DPO, "other_column.jsonl", ["row 3, column 'rejected'"]),
    (DPO, "nan.csv", ["row 1, column 'chosen'", "None"]),
    (DPO, "pairs.jsonl --dataset_train_split train[5:2]", ["has no rows", "at least one preference pair"]),
    (SFT, "pairs.jsonl", ["'prompt', 'chosen', 'rejected'", "expected 'text'", "formatting_func"]),
    (SFT, "text_null.jsonl", ["row 2, column 'text'", "None", "expected a string"]),
    (SFT, "text_number.jsonl", ["row 1, column 'text'", "3 is of type int"]),
    (SFT, "text_numbers.jsonl", ["row 0, column 'text'", "2 is of type int"]),
    (SFT, "role.jsonl", ["row 1, column 'messages'", "[{{'content': 'Hi'}}]"]),
    (SFT, "messages_empty.jsonl", ["row 1, column 'messages'", "[]"]),
    (SFT, "messages_null.jsonl", ["row 1, column 'messages'", "None"]),
    (SFT, "ids_words.jsonl", ["column 'input_ids'", "expected lists of integers, got list<", "Tokenize"]),
    (SFT, "ids_large.jsonl", ["row 1, column 'input_ids'", "99999", "331 entries"]),
    (SFT, "ids_negative.jsonl", ["row 1, column 'input_ids'", "-4"]),
    (SFT, "ids_empty.jsonl", ["dataset is empty", "max_length=64"]),
    (KTO, "label_words.jsonl", ["row 0, column 'label'", "'good'", "True"]),
    (KTO, "labels_null.jsonl", ["row 3, column 'label'", "None"]),
    (KTO, "texts.jsonl", ["['text']", "no 'prompt'", "'completion'"]),
    (REWARD, "null.jsonl", ["row 5, column 'chosen'", "None"]),
    (REWARD, "type.jsonl", ["row 5, column 'chosen'", "7"]),
    (REWARD, "texts.jsonl", ["['text']", "expected 'chosen' and 'rejected'"]),
    (GRPO, "no_prompt.jsonl", ["['question']", "'prompt'"]),
    (GRPO, "prompt_null.jsonl", ["row 1, column 'prompt'", "None"]),
    (PPO, "no_prompt.jsonl", ["['question']", "'prompt'"]),
]


@pytest.mark.parametrize("command, name, named", ROWS, ids=[f"{row[0].split()[0]}-{row[1]}" for row in ROWS])
def test_a_row_that_cannot_be_used(command, name, named, refused):
    refused(f"{command} --dataset_name {{data}}/{name}", f"{{data}}/{name.split()[0]}", *named)


def test_a_stream_ends_training_at_a_bad_row_with_one_line(places, tmp_path, capsys):
    flags = "--per_device_train_batch_size 1 --max_steps 5 --use_cpu true --bf16 false --report_to none"
    paths = ["--model_name_or_path", places["model"], "--dataset_name", f"{places['data']}/text_null.jsonl"]
    line = ["sft", *paths, "--output_dir", str(tmp_path), "--dataset_streaming", "--max_length", "64", *flags.split()]
    assert main(line) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert f"trl-fast sft: {places['data']}/text_null.jsonl: The train dataset" in errors and "None" in errors


SPLITS = [
    ("--dataset_name {data}/pairs.jsonl --dataset_train_split dev", ["has no split 'dev'", "dataset_train_split"]),
    ("--dataset_name {data}/pairs.jsonl --dataset_train_split train[:0]", ["split 'train[:0]' has no rows"]),
    ("--dataset_name {data}/pairs.jsonl --dataset_train_split train[:abc]", ["no split 'train[:abc]'", "train[:90%]"]),
    ("--dataset_name {data}/pairs.jsonl --dataset_train_split train[:200%]", ["'train[:200%]'", "slice boundaries"]),
    ("--dataset_name {data}/pairs.jsonl --dataset_train_split none", ["split=None names no split"]),
    ("--dataset_name {data}/pairs.jsonl --dataset_config en", ["{data}/pairs.jsonl"]),
    (
        "--dataset_name {data}/pairs.jsonl --eval_strategy steps --eval_steps 1",
        ["no split 'test'", "dataset_test_split"],
    ),
    ("--dataset_name {data}/split --eval_strategy steps", ["{data}/split/test.jsonl, line 4"]),
    ("--dataset_name {data}/pairs.csv --dataset_streaming --max_steps -1", ["max_steps has to be specified"]),
    ("--dataset_name no/such-dataset", ["dataset_name='no/such-dataset'"]),
    ("--dataset_name ''", ["dataset_name is empty; give a hub name"]),
    ("", ["dataset_name is missing; give a hub name, a folder or a file"]),
]


@pytest.mark.parametrize("flags, named", SPLITS, ids=[flags or "nothing" for flags, _ in SPLITS])
def test_a_dataset_that_is_not_there(flags, named, refused):
    refused(f"{DPO} {flags}", *named)


VALIDATE = [
    ("--dataset_name {data}/columns.jsonl", ["['prompt', 'chosen']", "expected 'chosen' and 'rejected'"]),
    ("--dataset_name {data}/nothing.jsonl", ["there is no such file"]),
    ("--dataset_name {data}/texts.jsonl", ["['text']"]),
    ("--dataset_name {data}/split", ["{data}/split/test.jsonl, line 4, column 16"]),
    ("--dataset_name {data}/pairs.jsonl --tokenizer {out}/nothing", ["{out}/nothing", "there is no such folder"]),
    ("--dataset_name {data}/pairs.jsonl --tokenizer {models}/no_tokenizer", ["no tokenizer can be loaded from"]),
    ("--dataset_name {data}/pairs.jsonl --tokenizer {model} --max_length -1", ["max_length=-1", "positive"]),
    ("--dataset_name {data}/pairs.jsonl --max_length x", ["--max_length", "'x'"]),
    ("--dataset_name {data}/pairs.jsonl --fail_on errors", ["--fail_on", "did you mean 'error'?"]),
    ("--dataset_name {data}/pairs.jsonl --output_dir {data}/pairs.jsonl", ["output_dir=", "cannot be written to"]),
    ("--dataset_name {data}/pairs.jsonl --tokeniser x", ["--tokeniser", "did you mean 'tokenizer'?"]),
    ("", ["dataset_name is missing"]),
]


@pytest.mark.parametrize("flags, named", VALIDATE, ids=[flags or "nothing" for flags, _ in VALIDATE])
def test_validate(flags, named, refused):
    refused(f"validate {flags}", *named)


def test_validate_finds_what_stops_training_in_the_words_of_training(refused, places, capsys):
    for name in ("type.jsonl", "null.jsonl"):
        line = refused(f"{DPO} --dataset_name {{data}}/{name}")
        assert main(["validate", "--dataset_name", f"{places['data']}/{name}"]) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "row cannot be read" in shown and "training stops" in shown
        assert line.rpartition("column ")[2].split(";")[0].split(": ")[1].split(" is of")[0] in shown
