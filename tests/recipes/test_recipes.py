"""Tests the recipes: each fits its GPU by simulation, is read by its command, and trains a tiny model of its kind."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from support.models import save_tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.cli.main import main
from trl_fast.cli.training import make_parser
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.peak_estimates import estimate
from trl_fast.planning.training_setup import setup_from_training
from trl_fast.trainers.methods import METHODS

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
GIB = 1 << 30
# A tenth of a GPU is left for what a plan does not see: the CUDA context and gaps between tensors.
SHARE = 0.9
HUB_NAMES = {
    "gemma-3-1b": "google/gemma-3-1b-it",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
QUICK = ("llama-3.1-8b/dpo-24gb",)
QLORA = ("llama-3.1-8b/sft-qlora-24gb", "llama-3.1-8b/dpo-qlora-24gb")


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def parts_of(path):
    """Model, method and GiB that a recipe's place names."""
    method, *_, size = path.stem.split("-")
    return path.parent.name, method, int(size.removesuffix("gb"))


def parsed(path, folder):
    method = parts_of(path)[1]
    flags = ["--config", path, "--output_dir", folder, "--use_cpu", "true", "--bf16", "true", "--report_to", "none"]
    return make_parser(METHODS[method]).parse_args_and_config([str(flag) for flag in flags])


def planned_gib(path, folder):
    """The peak of a step in GiB, with every sequence as long as it may be."""
    model, method, _ = parts_of(path)
    _, args, model_args, *_ = parsed(path, folder)
    setup = setup_from_training(method, args, model_args, model_config(model))
    return estimate(setup, setup.max_length).bytes / GIB


def test_there_is_a_recipe_for_each_model_method_and_size():
    names = itertools.product(HUB_NAMES, ("sft", "dpo", "grpo"), (24, 48, 80))
    wanted = {f"{model}/{method}-{size}gb" for model, method, size in names}
    assert {name_of(path) for path in RECIPES} == wanted | set(QLORA)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_read_by_its_command(path, tmp_path):
    script_args, args, model_args, *_ = parsed(path, tmp_path)
    model, method, _ = parts_of(path)
    values = yaml.safe_load(path.read_text())
    assert model_args.model_name_or_path == HUB_NAMES[model]
    assert model_args.dtype == "bfloat16"
    qlora = name_of(path) in QLORA
    assert values["output_dir"] == f"runs/{model}-{method}" + "-qlora" * qlora
    assert model_args.load_in_4bit == qlora
    assert script_args.dataset_name.startswith("trl-lib/")
    assert f"trl-fast {method} --config recipes/{name_of(path)}.yaml" in path.read_text()


@pytest.mark.parametrize("path", [path for path in RECIPES if name_of(path) in QUICK], ids=name_of)
def test_some_recipes_fit_their_gpu(path, tmp_path):
    assert planned_gib(path, tmp_path) <= SHARE * parts_of(path)[2]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in RECIPES if name_of(path) not in QUICK], ids=name_of)
def test_recipes_fit_their_gpu(path, tmp_path):
    assert planned_gib(path, tmp_path) <= SHARE * parts_of(path)[2]


FAMILIES = {
    "gemma-3-1b": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "llama-3.1-8b": ("llama", {}),
    "qwen2.5-0.5b": ("qwen2", {}),
    "qwen3-4b": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-8b": ("qwen3", {}),
}
QUESTION = [{"role": "user", "content": "What color is red, number {}?"}]
ANSWER = [{"role": "assistant", "content": "It is red."}]
ROWS = {
    "sft": {"messages": QUESTION + ANSWER},
    "dpo": {"chosen": QUESTION + ANSWER, "rejected": [*QUESTION, {"role": "assistant", "content": "It is blue."}]},
    "grpo": {"prompt": QUESTION, "solution": "$2$"},
}
SMALL = {
    "sft": ["--max_length", "64"],
    "dpo": ["--max_length", "64"],
    "grpo": ["--max_completion_length", "4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_trains_a_tiny_model_of_its_kind(path, tmp_path):
    model, method, _ = parts_of(path)
    family, options = FAMILIES[model]
    folder = save_tiny_model(tmp_path / "model", build_tokenizer(), family, max_position_embeddings=4096, **options)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(ROWS[method]).replace("{}", str(number)) for number in range(64)))
    flags = [
        "--config",
        path,
        "--model_name_or_path",
        folder,
        "--dataset_name",
        data,
        "--output_dir",
        tmp_path / "run",
    ]
    flags += [*SMALL[method], "--gradient_accumulation_steps", 1, "--max_steps", 2, "--save_strategy", "no"]
    flags += ["--use_cpu", "true", "--report_to", "none", "--dataloader_pin_memory", "false"]
    if method == "grpo":
        flags += ["--per_device_train_batch_size", 8, "--steps_per_generation", 1]
    assert main([method, *map(str, flags)]) == 0
    assert any((tmp_path / "run").glob("*.safetensors"))
