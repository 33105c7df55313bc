"""QLoRA on the command line: trained by flags, said in the run's lines, merged."""

import json
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.low_bit import low_bit_layers
from support.models import save_tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.cli.main import main

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

RUN = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 false --report_to none --save_strategy no"


@pytest.fixture
def base(tmp_path):
    return save_tiny_model(tmp_path / "wide", build_tokenizer(), hidden_size=64)


@pytest.fixture
def train(base, pairs_file, tmp_path, capsys):
    def train(method, *flags):
        folder = str(tmp_path / "out")
        words = [method, "--model_name_or_path", base, "--dataset_name", str(pairs_file), "--output_dir", folder]
        assert main([*words, *RUN.split(), "--dataloader_pin_memory", "false", *flags]) == 0
        return folder, capsys.readouterr().out

    return train


def test_an_adapter_is_trained_and_merged(train, capsys):
    folder, shown = train("dpo", "--load_in_4bit", "--use_peft", "--lora_target_modules", "all-linear")
    assert "4-bit" in shown
    assert {str(weight.dtype) for weight in load_file(f"{folder}/adapter_model.safetensors").values()} == {
        "torch.bfloat16"
    }
    assert json.loads(Path(folder, "run.json").read_text())["model"]["dtype"] == "4-bit"
    assert not low_bit_layers(AutoPeftModelForCausalLM.from_pretrained(folder))
    assert main(["merge", folder, "--load_in_4bit"]) == 0
    assert AutoModelForCausalLM.from_pretrained(f"{folder}-merged").num_parameters() > 0


def test_8_bits_are_said(train):
    shown = train("dpo", "--load_in_8bit", "--use_peft", "--dry_run")[1]
    assert "8-bit" in shown


def test_low_bits_without_an_adapter(base, pairs_file, tmp_path, capsys):
    words = ["dpo", "--model_name_or_path", base, "--dataset_name", str(pairs_file), "--load_in_4bit"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), *RUN.split()]) == 2
    assert "weights in 4 or 8 bits cannot train; give a peft_config" in capsys.readouterr().err.splitlines()[-1]
