"""Files and folders that are broken in one way each: data, YAML, models."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from support.training import color_labels, color_pairs

PAIRS = [dict(row) for row in color_pairs(8)]


def lines(rows: list[object]) -> str:
    """Rows as JSON Lines; texts stand as they are."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def with_row(index: int, **changes: object) -> list[dict]:
    """Eight preference pairs, one of them changed."""
    return [{**row, **changes} if number == index else row for number, row in enumerate(PAIRS)]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = lines(PAIRS)
# Data files by name: whole ones (pairs, texts, labels, prompts, chats), and broken ones.
TEXTS = {
    "pairs.jsonl": GOOD,
    "texts.jsonl": lines([{"text": f"Row {number} is blue."} for number in range(8)]),
    "labels.jsonl": lines([dict(row) for row in color_labels(8)]),
    "prompts.jsonl": lines([{"prompt": f"What color is {number}?"} for number in range(8)]),
    "chats.jsonl": lines([{"messages": CHAT}] * 8),
    "pairs.csv": Dataset.from_list(PAIRS).to_pandas().to_csv(index=False),
    # Malformed
    "comma.jsonl": lines([*PAIRS[:3], '{"prompt": "a" "chosen": "b"}', *PAIRS[3:]]),
    "single_quotes.jsonl": lines([*PAIRS[:2], "{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}"]),
    "cut.jsonl": GOOD[:-30],
    "word.jsonl": lines([*PAIRS[:4], "hello"]),
    "nan_word.jsonl": lines([*PAIRS[:1], '{"prompt": NAN, "chosen": "b", "rejected": "c"}']),
    "two_on_a_line.jsonl": lines([*PAIRS[:1], json.dumps(PAIRS[0]) + json.dumps(PAIRS[1])]),
    "list_of_rows.json": json.dumps(PAIRS)[:-10],
    "number.json": "42",
    "words.json": "this is no JSON",
    "not_rows.jsonl": lines([*PAIRS[:2], [1, 2]]),
    "empty.jsonl": "",
    "empty.json": "",
    "empty.csv": "",
    "empty_list.json": "[]",
    "blank.jsonl": "\n\n\n",
    "header.csv": "prompt,chosen,rejected\n",
    "fields.csv": "prompt,chosen,rejected\na,b,c\na,b,c,d,e\n",
    "quote.csv": 'prompt,chosen,rejected\na,b,c\na,"b,c\n',
    "text.parquet": "this is text\n",
    "empty.parquet": "",
    "text.arrow": "this is text\n",
    "empty.arrow": "",
    "text.jsonl.gz": GOOD,
    "pairs.txt": "some text\n",
    "pairs.xlsx": "no sheet\n",
    "noending": GOOD,
    # Wrong types
    "type.jsonl": lines(with_row(5, chosen=7)),
    "list.jsonl": lines(with_row(5, chosen=["a"])),
    "null.jsonl": lines(with_row(5, chosen=None)),
    "all_numbers.jsonl": lines([{**row, "chosen": 1} for row in PAIRS]),
    "empty_text.jsonl": lines(with_row(5, chosen="", rejected="")),
    "same.jsonl": lines(with_row(5, chosen="same", rejected="same")),
    "columns.jsonl": lines([{"prompt": "a", "chosen": "b"}] * 4),
    "misspelt.jsonl": lines([{"prompt": "a", "choosen": "b", "rejected": "c"}] * 4),
    "other_column.jsonl": lines([*PAIRS[:3], {"prompt": "a", "chosen": "b", "extra": 1}]),
    "nan.csv": "prompt,chosen,rejected\na,b,c\na,,c\n",
    "label_words.jsonl": lines([{"prompt": "a", "completion": "b", "label": "good"}] * 4),
    "labels_null.jsonl": lines([*[dict(row) for row in color_labels(3)], {"prompt": "a", "completion": "b"}]),
    "text_null.jsonl": lines([{"text": "a"}, {"text": "b"}, {"text": None}]),
    "text_number.jsonl": lines([{"text": "a"}, {"text": 3}]),
    "text_numbers.jsonl": lines([{"text": 2}, {"text": 3}]),
    "text_empty.jsonl": lines([{"text": ""}] * 4),
    "prompt_null.jsonl": lines([{"prompt": "a"}, {"prompt": None}]),
    "no_prompt.jsonl": lines([{"question": "a"}] * 4),
    "role.jsonl": lines([{"messages": CHAT}, {"messages": [{"content": "Hi"}]}]),
    "messages_empty.jsonl": lines([{"messages": CHAT}, {"messages": []}]),
    "messages_null.jsonl": lines([{"messages": CHAT}, {"messages": None}]),
    "content_null.jsonl": lines([{"messages": CHAT}, {"messages": [{"role": "user", "content": None}]}]),
    "messages_text.jsonl": lines([{"messages": "user: Hi"}] * 4),
    "ids_words.jsonl": lines([{"input_ids": ["a", "b"]}] * 4),
    "ids_large.jsonl": lines([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 99999]}]),
    "ids_negative.jsonl": lines([{"input_ids": [1, 2, 3]}, {"input_ids": [1, -4]}]),
    "ids_empty.jsonl": lines([{"input_ids": []}] * 4),
    "ids_mask.jsonl": lines([{"input_ids": [1, 2, 3], "completion_mask": [1, 0]}] * 4),
}
BINARIES = {
    "binary.jsonl": bytes(range(256)) * 8,
    "binary.csv": b"\x00\xff\xfe\x80" * 300,
    "binary.parquet": bytes(range(256)) * 8,
    "utf16.jsonl": GOOD.encode("utf-16"),
    "utf16.csv": TEXTS["pairs.csv"].encode("utf-16"),
    "latin1.jsonl": lines([*PAIRS[:2], '{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}']).encode("latin-1"),
    "zeros.jsonl": b"\x00" * 500,
    "cut.jsonl.gz": gzip.compress(GOOD.encode() * 50)[:-40],
    "text2.jsonl.gz": GOOD.encode(),
    "comma.jsonl.gz": gzip.compress(TEXTS["comma.jsonl"].encode()),
    "gzip.jsonl": gzip.compress(GOOD.encode()),
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD.encode(),
    "utf16.yaml": "beta: 1\n".encode("utf-16"),
}


def write_data(folder: Path) -> None:
    """Writes the data files, and folders of them."""
    for name, text in TEXTS.items():
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for name, content in BINARIES.items():
        (folder / name).write_bytes(content)
    parquet, arrow = folder / "pairs.parquet", folder / "pairs.arrow"
    table = pa.Table.from_pylist(PAIRS)
    pq.write_table(table, parquet)
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for whole in (parquet, arrow):
        whole.with_stem("cut").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name in ("empty_folder", "folder.jsonl", "mixed", "split", "saved"):
        (folder / name).mkdir()
    (folder / "mixed" / "train.jsonl").write_text(GOOD)
    shutil.copy(parquet, folder / "mixed" / "test.parquet")
    (folder / "split" / "train.jsonl").write_text(GOOD)
    (folder / "split" / "test.jsonl").write_text(TEXTS["comma.jsonl"])
    Dataset.from_list(PAIRS).save_to_disk(str(folder / "saved"))


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def _config(place: Path, **changes: object) -> None:
    config = {**json.loads((place / "config.json").read_text()), **changes}
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def _weights(place: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = change(load_file(place / "model.safetensors"))
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


def _filled(weights: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    weights[WEIGHT].view(-1)[5] = value
    return weights


def _pickled(place: Path) -> None:
    torch.save({**load_file(place / "model.safetensors"), "x": RunsCode()}, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def _replaced(place: Path, name: str, content: bytes) -> None:
    """Writes a file in the place of the weights."""
    (place / "model.safetensors").unlink()
    (place / name).write_bytes(content)


def _without_template(place: Path) -> None:
    (place / "chat_template.jinja").unlink()


class RunsCode:
    """Prints when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (print, ("CODE OF THE PICKLE WAS RUN",))


INDEX = json.dumps({"metadata": {}, "weight_map": {WEIGHT: "model-00001-of-00002.safetensors"}})
REMOTE = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
# What each broken folder's name does to a copy of a whole one.
MODELS: dict[str, Callable[[Path], object]] = {
    "no_config": lambda place: (place / "config.json").unlink(),
    "no_weights": lambda place: (place / "model.safetensors").unlink(),
    "empty_config": lambda place: (place / "config.json").write_text(""),
    "cut_config": lambda place: (place / "config.json").write_text('{"model_type": "llama",'),
    "no_type": lambda place: _config(place, model_type=...),
    "unknown_type": lambda place: _config(place, model_type="lama"),
    "other_type": lambda place: _config(place, model_type="qwen3_moe"),
    "wider": lambda place: _config(place, hidden_size=64),
    "heads": lambda place: _config(place, num_attention_heads=5),
    "smaller_vocabulary": lambda place: _config(place, vocab_size=100),
    "deeper": lambda place: _config(place, num_hidden_layers=4),
    "activation": lambda place: _config(place, hidden_act="swiish"),
    "remote": lambda place: _config(place, auto_map=REMOTE, model_type="new"),
    "cut_weights": lambda place: _cut(place / "model.safetensors"),
    "empty_weights": lambda place: (place / "model.safetensors").write_bytes(b""),
    "pointer": lambda place: (place / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
    "zero_weights": lambda place: (place / "model.safetensors").write_bytes(b"\0" * 4096),
    "missing_weight": lambda place: _weights(place, lambda old: {k: v for k, v in old.items() if k != WEIGHT}),
    "shape": lambda place: _weights(place, lambda old: {**old, WEIGHT: old[WEIGHT][:, :16].contiguous()}),
    "nan": lambda place: _weights(place, lambda old: _filled(old, math.nan)),
    "infinite": lambda place: _weights(place, lambda old: _filled(old, math.inf)),
    "foreign": lambda place: _weights(place, lambda old: {f"x.{key}": value for key, value in old.items()}),
    "pickle": _pickled,
    "cut_pickle": lambda place: _replaced(place, "pytorch_model.bin", b"PK\x03\x04 cut"),
    "shards": lambda place: _replaced(place, "model.safetensors.index.json", INDEX.encode()),
    "cut_index": lambda place: _replaced(place, "model.safetensors.index.json", b"{"),
    "no_tokenizer": lambda place: [file.unlink() for file in place.glob("*token*")],
    "cut_tokenizer": lambda place: (place / "tokenizer.json").write_text('{"version": "1.0",'),
    "no_template": _without_template,
    "bad_template": lambda place: (place / "chat_template.jinja").write_text("{{ messages }"),
}
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_models(folder: Path, model: str) -> None:
    """Writes the broken copies of a model's folder (tiny Llama with tokenizer), and folders that are none."""
    for name, change in MODELS.items():
        shutil.copytree(model, folder / name)
        change(folder / name)
    (folder / "remote" / "code.py").write_text("raise RuntimeError('CODE OF THE FOLDER WAS RUN')\n")
    for name, base in (("adapter", "/no/such/base"), ("adapter_without_base", None)):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({**ADAPTER, "base_model_name_or_path": base}))
        save_file({"base_model.model.x": torch.zeros(2)}, folder / name / "adapter_model.safetensors")
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("no model")


# Lines of YAML files of a `dpo` run, by the files' names; DATA is the folder of data files.
YAML = {
    "good": "",
    "syntax": "beta: [0.1\nmax_length: 9\n",
    "tab": "beta: 0.1\n\tmax_length: 9\n",
    "tab_value": "lr_scheduler_kwargs:\n\tnum_cycles: 1\n",
    "colon": "beta 0.1\nmax_length: 9\n",
    "quote": 'run_name: "abc\nbeta: 0.1\n',
    "merge": "base: &base\n  beta: 0.1\n<<: *base\n",
    "merge_unknown": "<<: {betta: 0.1}\n",
    "merge_list": "<<: 3\n",
    "loop": "model_init_kwargs: &a\n  self: *a\n",
    "loop_list": "loss_type: &a [*a]\n",
    "anchor": "beta: *nothing\n",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "null_beta": "beta:\n",
    "null_epochs": "num_train_epochs: null\n",
    "null_output": "output_dir:\n",
    "null_bool": "use_peft: null\n",
    "list_for_number": "beta: [0.1, 0.2]\n",
    "map_for_number": "beta: {a: 1}\n",
    "list_for_text": "run_name: [a, b]\n",
    "list_for_revision": "model_revision: [a, b]\n",
    "map_for_text": "dataset_config: {a: b}\n",
    "word_for_number": "learning_rate: fast\n",
    "word_for_bool": "bf16: maybe\n",
    "number_for_bool": "use_peft: 3\n",
    "text_exponent": "learning_rate: 1e-5x\n",
    "duplicate": "beta: 0.1\nbeta: 0.2\n",
    "unknown": "betta: 0.1\n",
    "unknown_nested": "dataset:\n  name: x\n",
    "number_key": "3: 4\n",
    "list_key": "[a, b]: 4\n",
    "map_key": "{a: 1}: 4\n",
    "choice": "loss_type: sigmoyd\n",
    "choice_dtype": "dtype: bf16\n",
    "range": "beta: -1\n",
    "nan": "beta: .nan\n",
    "inf": "learning_rate: .inf\n",
    "datasets_text": "datasets: pairs.jsonl\n",
    "datasets_map": "datasets:\n  path: pairs.jsonl\n",
    "datasets_texts": "datasets:\n  - pairs.jsonl\n",
    "datasets_null": "datasets:\n",
    "datasets_null_entry": "datasets:\n  -\n",
    "datasets_no_path": "datasets:\n  - name: x\n",
    "datasets_null_path": "datasets:\n  - path:\n",
    "datasets_key": "datasets:\n  - path: DATA/pairs.jsonl\n    splitt: train\n",
    "datasets_columns": "datasets:\n  - path: DATA/pairs.jsonl\n    columns: [prompt, chosn]\n",
    "datasets_columns_text": "datasets:\n  - path: DATA/pairs.jsonl\n    columns: prompt\n",
    "datasets_fraction": "datasets:\n  - path: DATA/pairs.jsonl\n    fraction: half\n",
    "datasets_fraction_nan": "datasets:\n  - path: DATA/pairs.jsonl\n    fraction: .nan\n",
    "datasets_file": "datasets:\n  - path: DATA/nothing.jsonl\n",
    "datasets_split": "datasets:\n  - path: DATA/pairs.jsonl\n    split: dev\n",
    "datasets_mixed": "datasets:\n  - path: DATA/pairs.jsonl\n  - path: DATA/prompts.jsonl\n",
    "datasets_test_size": "datasets:\n  - path: DATA/pairs.jsonl\ntest_split_size: 100\n",
    "datasets_test_size_nan": "datasets:\n  - path: DATA/pairs.jsonl\ntest_split_size: .nan\n",
    "datasets_test_size_negative": "datasets:\n  - path: DATA/pairs.jsonl\ntest_split_size: -1\n",
    "env_list": "env: [a]\n",
    "env_text": "env: A=1\n",
    "tag": "run_name: !!python/object/apply:os.system ['echo hi']\n",
    "tag_unknown": "run_name: !mine 3\n",
    "binary_value": "run_name: !!binary ///\n",
    "date": "learning_rate: 2020-01-01\n",
    "documents": "---\nbeta: 0.2\n",
    "kwargs_text": "model_init_kwargs: nonsense\n",
    "kwargs_list": "model_init_kwargs: [a]\n",
    "kwargs_unknown": "model_init_kwargs: {no_such_thing: 1}\n",
    "report_to_word": "report_to: wandbb\n",
}
# Whole YAML files.
YAML_FILES = {
    "empty": b"",
    "comment": b"# nothing\n",
    "list": b"- beta: 0.1\n",
    "words": b"just words\n",
    "binary": bytes(range(256)),
    "utf16": "beta: 1\n".encode("utf-16"),
    "latin1": "run_name: caf\xe9\n".encode("latin-1"),
}


def write_yaml(folder: Path, model: str, data: str) -> None:
    """Writes the YAML files: each but the whole ones names the model and a good data file in its first two lines."""
    for name, text in YAML.items():
        lines = f"model_name_or_path: {model}\ndataset_name: {data}/pairs.jsonl\n{text.replace('DATA', data)}"
        (folder / f"{name}.yaml").write_text(lines)
    for name, content in YAML_FILES.items():
        (folder / f"{name}.yaml").write_bytes(content)
    (folder / "folder.yaml").mkdir()
