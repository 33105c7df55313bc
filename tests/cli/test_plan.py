"""`trl-fast plan`: what it prints, and what it refuses."""

import json

import pytest

from support.models import tiny_config
from trl_fast.cli.main import main
from trl_fast.planning.comparisons import switches
from trl_fast.planning.peak_estimates import Longest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape")
    tiny_config("llama", vocab_size=2048, max_position_embeddings=512).save_pretrained(path)
    return path


def plan(model, *flags):
    return main(["plan", "--model", str(model), "--plot", "none", "--compare", "false", *flags])


def longest_of(output):
    (line,) = (line for line in output.splitlines() if line.startswith("Longest context"))
    return int(line.split(":")[1].split()[0].replace(",", ""))


def test_peak_parts_stages_other_systems_and_switches(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.cli.plan.switches", lambda *given: switches(*given)[:4])
    plot = tmp_path / "memory.png"
    assert main(["plan", "--model", str(folder), "--max_length", "256", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    assert "Simulated, not measured: dpo" in output and plot.is_file()
    for expected in ("weights", "optimizer", "saved activations", "head and loss", "first layer backward"):
        assert expected in output
    # Without gpu_memory there is nothing to fit.
    for expected in ("TRL 1.16", "full logits", "gradient_checkpointing=False", "tiled_mlp=4096"):
        assert expected in output
    assert "longest" not in output


@pytest.mark.slow
def test_more_memory_holds_longer_contexts(folder, capsys):
    assert plan(folder, "--method", "sft", "--gpu_memory", "4MiB", "--max_length", "512") == 0
    output = capsys.readouterr().out
    assert "does not fit gpu_memory" in output
    short = longest_of(output)
    assert short < 512
    assert (
        plan(
            folder,
            "--method",
            "sft",
            "--gpu_memory",
            "16MiB",
            "--max_length",
            "256",
            "--activation_offloading",
            "true",
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "GiB fits gpu_memory" in output and longest_of(output) > 1.5 * short
    assert f"Memory allows {longest_of(output):,} tokens; the model was made for 512 positions." in output


@pytest.mark.parametrize(
    "method, flags",
    [
        ("sft", ()),
        ("reward", ()),
        ("dpo", ("--prompt_tokens", "0")),
        ("kto", ()),
        ("grpo", ("--num_generations", "4", "--per_device_train_batch_size", "4")),
        ("ppo", ("--prompt_tokens", "0")),
    ],
)
def test_other_methods_and_prompts_and_an_adapter(method, flags, folder, capsys):
    assert plan(folder, "--method", method, "--peft", "lora", "--lora_r", "4", "--max_length", "128", *flags) == 0
    assert f"{method}, {folder}, LoRA r=4" in capsys.readouterr().out


def test_layers_that_need_no_checkpointing_on_a_gpu(folder, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.cli.plan.longest_context", lambda *_: Longest(64, None))
    flags = ("--method", "sft", "--max_length", "128", "--gpu_memory", "4GiB")
    assert plan(folder, *flags) == 0
    printed = capsys.readouterr().out
    assert "let 2 of 2 layers go uncheckpointed." in printed and "workspace will be 1.00 GiB there" in printed
    assert plan(folder, *flags, "--gpu_memory", "80GiB") == 0
    assert "The head's workspace will be 4.00 GiB there, of what is free." in capsys.readouterr().out
    assert plan(folder, *flags, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "uncheckpointed" not in printed and "workspace will be" not in printed


def test_a_config_file_and_a_built_in_shape(folder, capsys):
    assert plan(folder / "config.json", "--max_length", "64") == 0
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "llama-3.1-8b" in capsys.readouterr().out


# ---- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--max_length", "1"), "max_length=1: expected at least 2 tokens"),
        (("--prompt_tokens", "64", "--max_length", "64"), "prompt_tokens=64: expected a number from 0 to below"),
        (("--prompt_tokens", "8", "--method", "sft"), "prompt_tokens=8 has no meaning for sft"),
        (("--gpu_memory", "plenty"), "gpu_memory='plenty': expected a size above zero such as 80GiB"),
        (("--gpu_memory", "1MiB"), "gpu_memory=0.00 GiB cannot hold what training needs at any length: weights"),
        (("--tiled_mlp", "-3"), "tiled_mlp: expected an integer >= 1 or None, got -3; True: 4096 tokens"),
        (("--tiled_mlp", "many"), "tiled_mlp: expected an integer >= 1 or None, got 'many'"),
        (("--lora_r", "0", "--peft", "lora"), "lora_r: expected an integer >= 1 or None, got 0"),
        (("--peft", "lora", "--lora_target_modules", "q_projection"), "q_projection"),
        (("--method", "sft", "--batch_layout", "shared_prefix"), "batch_layout='shared_prefix' cannot be used"),
        (("--max_lenght", "64"), "unknown argument --max_lenght; did you mean 'max_length'?"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_message_before_anything_is_simulated(flags, message, folder, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.cli.plan.simulate", None)
    assert plan(folder, *flags) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("flags", [("--method", "dqo"), ("--batch_layout", "ragged"), ("--dtype", "int8")])
def test_unknown_choices_are_named_with_the_known_ones(flags, folder, capsys):
    with pytest.raises(SystemExit):
        plan(folder, *flags)
    assert f"invalid choice: '{flags[1]}' (choose from" in capsys.readouterr().err


def test_models_that_are_unknown_or_no_decoders(tmp_path, capsys):
    assert main(["plan"]) == 2
    assert "model is required: a hub name, a folder, or one of smollm2-135m" in capsys.readouterr().err
    assert plan("llama-3.1-8") == 2
    error = capsys.readouterr().err
    assert "model='llama-3.1-8' is no built-in shape" in error and "did you mean 'llama-3.1-8b'" in error
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert plan(tmp_path) == 2
    assert "(t5) is no language model of decoder layers alone" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert plan(tmp_path, "--tiled_mlp", "64") == 2
    assert "tiled_mlp=64: MambaForCausalLM has no MLP that can be tiled" in capsys.readouterr().err


def test_lengths_beyond_the_models_positions(folder, tmp_path, capsys, caplog):
    tiny_config("gpt2", max_position_embeddings=40).save_pretrained(tmp_path)
    assert plan(tmp_path, "--max_length", "41") == 2
    assert "GPT2LMHeadModel has a table of 40 positions" in capsys.readouterr().err
    assert plan(folder, "--max_length", "513") == 0
    assert "more than the 512 positions that LlamaForCausalLM was made for" in caplog.text
