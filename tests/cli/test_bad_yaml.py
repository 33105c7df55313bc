"""YAML files that are malformed, loop, or hold what their keys do not take: one line with file and line."""

import pytest

# The file, the line that has to be named (None: there is none), and what the message has to name besides.
FILES = {
    "syntax": (4, ["no valid YAML", "',' or ']'"]),
    "tab": (4, ["no valid YAML", "'\\t'"]),
    "tab_value": (4, ["no valid YAML", "'\\t'"]),
    "colon": (4, ["no valid YAML", "':'"]),
    "quote": (5, ["no valid YAML", "end of stream"]),
    "merge": (3, ["base is an unknown key"]),
    "merge_unknown": (3, ["betta is an unknown key; did you mean 'beta'?"]),
    "merge_list": (3, ["no valid YAML", "mapping", "scalar"]),
    "loop": (3, ["an alias stands inside of what it names"]),
    "loop_list": (3, ["an alias stands inside of what it names"]),
    "anchor": (3, ["undefined alias 'nothing'"]),
    "bomb": (3, ["aliases make more than 10000 values"]),
    "null_beta": (3, ["beta: expected a finite number >= 0, got None", "0.1"]),
    "null_epochs": (3, ["num_train_epochs: expected a finite number >= 0, got None", "3.0"]),
    "null_bool": (3, ["use_peft: expected True or False, got None"]),
    "list_for_number": (3, ["beta: [0.1, 0.2]"]),
    "map_for_number": (3, ["beta: {{'a': 1}}"]),
    "list_for_text": (3, ["run_name: expected one text, got ['a', 'b']"]),
    "list_for_revision": (3, ["model_revision: expected one text, got ['a', 'b']"]),
    "map_for_text": (3, ["dataset_config: expected one text, got {{'a': 'b'}}"]),
    "word_for_number": (3, ["learning_rate: 'fast'", "float"]),
    "number_for_bool": (3, ["use_peft: 3", "true/false"]),
    "text_exponent": (3, ["learning_rate: '1e-5x'"]),
    "duplicate": (4, ["beta is given twice, first on line 3"]),
    "unknown": (3, ["betta is an unknown key; did you mean 'beta'?"]),
    "unknown_nested": (3, ["dataset is an unknown key; did you mean 'datasets'?"]),
    "number_key": (3, ["3 is no name of an argument"]),
    "list_key": (3, ["unhashable key"]),
    "map_key": (3, ["unhashable key"]),
    "choice": (3, ["loss_type=['sigmoyd']", "did you mean 'sigmoid'?"]),
    "choice_dtype": (3, ["dtype: 'bf16'", "did you mean 'bfloat16'?"]),
    "range": (3, ["beta: expected a finite number >= 0, got -1.0"]),
    "nan": (3, ["beta: expected a finite number >= 0, got nan"]),
    "inf": (3, ["learning_rate: expected a finite number >= 0, got inf"]),
    "datasets_text": (3, ["datasets.0.path='pairs.jsonl': there is no such file"]),
    "datasets_map": (3, ["datasets.0.path='pairs.jsonl': there is no such file"]),
    "datasets_texts": (3, ["datasets.0.path='pairs.jsonl': there is no such file"]),
    "datasets_null": (3, ["datasets: expected a list of maps", "got None"]),
    "datasets_null_entry": (3, ["datasets.0: expected a map", "got None"]),
    "datasets_no_path": (3, ["datasets.0: path is missing; give a hub name"]),
    "datasets_null_path": (3, ["datasets.0: path is missing"]),
    "datasets_key": (5, ["datasets.0.splitt is unknown; did you mean 'split'?"]),
    "datasets_columns": (5, ["datasets.0.columns names 'chosn'", "did you mean 'chosen'?"]),
    "datasets_columns_text": (None, ["['prompt']", "expected 'chosen' and 'rejected'"]),
    "datasets_fraction": (5, ["datasets.0.fraction: expected a finite number >= 0 or None, got 'half'"]),
    "datasets_fraction_nan": (5, ["datasets.0.fraction: expected a finite number >= 0 or None, got nan"]),
    "datasets_file": (4, ["datasets.0.path='{data}/nothing.jsonl': there is no such file"]),
    "datasets_split": (4, ["datasets.0.path='{data}/pairs.jsonl' has no split 'dev'"]),
    "datasets_mixed": (None, ["{data}/pairs.jsonl, {data}/prompts.jsonl", "row 8, column 'chosen'"]),
    "datasets_test_size": (5, ["test_split_size=100.0: the mixture has 8 rows"]),
    "datasets_test_size_nan": (5, ["test_split_size: expected a finite number > 0 or None, got nan"]),
    "datasets_test_size_negative": (5, ["test_split_size: expected a finite number > 0 or None, got -1.0"]),
    "env_list": (3, ["env must be a map of names to values, got ['a']"]),
    "env_text": (3, ["env must be a map of names to values, got 'A=1'"]),
    "tag": (3, ["no valid YAML", "os.system"]),
    "tag_unknown": (3, ["no valid YAML", "'!mine'"]),
    "binary_value": (3, ["no valid YAML", "base64"]),
    "date": (3, ["learning_rate: datetime.date(2020, 1, 1)"]),
    "documents": (3, ["no valid YAML", "another document"]),
    "kwargs_text": (3, ["model_init_kwargs: expected a map in JSON", "got 'nonsense'"]),
    "kwargs_list": (3, ["model_init_kwargs: expected a map", "got ['a']"]),
    "kwargs_unknown": (3, ["unexpected keyword argument 'no_such_thing'", "model_init_kwargs"]),
    "report_to_word": (3, ["report_to='wandbb' is unknown", "did you mean 'wandb'?"]),
    "empty": (None, ["holds no argument"]),
    "comment": (None, ["holds no argument"]),
    "list": (None, ["expected a map of argument names to values, got list"]),
    "words": (None, ["expected a map of argument names to values, got str"]),
    "binary": (None, ["is no UTF-8 text", "save it as UTF-8"]),
    "utf16": (None, ["is no UTF-8 text", "save it as UTF-8"]),
    "latin1": (None, ["is no UTF-8 text", "save it as UTF-8"]),
    "folder": (None, ["Is a directory"]),
    "nothing": (None, ["there is no such file"]),
}
FLAGS = "--output_dir {out} --per_device_train_batch_size 2 --max_steps 1 --max_length 64 --use_cpu true --bf16 false"


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name, refused):
    line, named = FILES[name]
    # A mixture's rows are named with their files, and not with the YAML file.
    place = [] if name in ("datasets_columns_text", "datasets_mixed") else [f"{{yaml}}/{name}.yaml"]
    if line is not None:
        place = [f"{{yaml}}/{name}.yaml, line {line}: "]
    refused(f"dpo {FLAGS} --config {{yaml}}/{name}.yaml", *place, *named)


def test_a_word_for_a_truth_value(refused):
    flags = FLAGS.replace("--bf16 false", "")
    refused(f"dpo {flags} --config {{yaml}}/word_for_bool.yaml", "line 3: bf16: 'maybe'", "true/false")


def test_merged_keys_are_taken(refused, places, tmp_path):
    (tmp_path / "merged.yaml").write_text("<<: {beta: 0.5, max_length: 32}\nbeta: -1\n")
    refused(f"dpo {FLAGS} --config {tmp_path}/merged.yaml", "line 2: beta: expected", "got -1.0")
    (tmp_path / "merged.yaml").write_text("<<: [{beta: -2}, {beta: 0.5}]\n")
    refused(f"dpo {FLAGS} --config {tmp_path}/merged.yaml", "line 1: beta: expected", "got -2.0")


def test_a_file_that_is_no_yaml(refused):
    refused("dpo RUN --config {data}/pairs.jsonl", "{data}/pairs.jsonl, line 2: no valid YAML")
