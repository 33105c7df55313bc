"""`trl-fast plan`: what it prints, and what it refuses."""

import json
import re

import pytest

from support.families import FAMILIES
from support.models import tiny_config
from support.vision_processors import save_tiny_vision_model
from trl_fast.cli.main import main
from trl_fast.cli.plan import read_arguments
from trl_fast.planning.comparisons import Row, switches
from trl_fast.planning.memory_sizes import GIB
from trl_fast.planning.memory_timeline import WEIGHTS, Peak
from trl_fast.planning.peak_estimates import Longest
from trl_fast.planning.report import remedies, verdict

ONE = ("--per_device_train_batch_size", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape")
    tiny_config("llama", vocab_size=2048, max_position_embeddings=512).save_pretrained(path)
    return path


def plan(method, model, *flags):
    return main(["plan", method, "--model_name_or_path", str(model), *ONE, "--compare", "false", *flags])


def words(output):
    """The output as one line."""
    return " ".join(output.split())


def longest_of(output):
    (line,) = (line for line in output.splitlines() if line.startswith("Longest context"))
    return int(line.split(":")[1].split()[0].replace(",", ""))


def test_peak_parts_stages_other_systems_and_switches(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.cli.plan.switches", lambda *given: switches(*given)[:4])
    plot = tmp_path / "memory.png"
    flags = ("--max_length", "256", "--plot", str(plot), "--dtype", "bfloat16")
    assert main(["plan", "dpo", "--model_name_or_path", str(folder), *ONE, *flags]) == 0
    printed = capsys.readouterr()
    output = printed.out
    # The verdict comes first, and all lines fit a terminal.
    assert output.startswith("Needs 0.0") and "fits a10g, l4, rtx4090 and larger ones." in words(output)
    assert all(len(line) <= 80 for line in output.splitlines() if str(plot) not in line and str(folder) not in line)
    assert f"Simulated, not measured, of {folder}:\ndpo, all weights" in output and plot.is_file()
    for expected in ("weights", "optimizer", "saved activations", "head and loss", "first layer backward"):
        assert expected in output
    # Without a GPU there is nothing to fit.
    for expected in (
        "TRL 1.16",
        "full logits",
        "gradient_checkpointing=False",
        "fused_layers=False",
        "tiled_mlp=4096",
    ):
        assert expected in output
    assert "longest" not in output
    # A line a stage where nobody watches a bar.
    assert "simulating 1/6: this plan\nsimulating 2/6: TRL 1.16\n" in printed.err


@pytest.mark.slow
def test_settings_that_a_model_cannot_have_are_left_out_with_their_reason(tmp_path, capsys, monkeypatch):
    def tiles_and_adapter(*given):
        named = switches(*given)
        return [named[0], *(each for each in named if each[0] in ("tiled_mlp=4096", "LoRA r=16, all-linear"))]

    monkeypatch.setattr("trl_fast.cli.plan.switches", tiles_and_adapter)
    monkeypatch.setattr("trl_fast.cli.plan.systems", lambda setup: [("this plan", setup)])
    tiny_config("nemotron_h", **FAMILIES["nemotron_h"]).save_pretrained(tmp_path)
    assert main(["plan", "dpo", "--model_name_or_path", str(tmp_path), *ONE, "--max_length", "64"]) == 0
    output = words(capsys.readouterr().out)
    assert "Left out, tiled_mlp=4096: tiled_mlp=4096: NemotronHForCausalLM has no MLP" in output
    assert "Left out, LoRA r=16, all-linear:" in output and "exclude_modules=['out_proj', 'conv1d']" in output


@pytest.mark.slow
def test_more_memory_holds_longer_contexts(folder, capsys):
    assert plan("sft", folder, "--dtype", "bfloat16", "--gpu_memory", "3MiB", "--max_length", "512") == 0
    output = capsys.readouterr().out
    assert output.startswith("Does not fit gpu_memory: ") and "GiB too much.\n" in output
    assert "Leave --compare false out to see which settings make it fit." in output
    short = longest_of(output)
    assert short < 512
    flags = ("--dtype", "bfloat16", "--gpu_memory", "16MiB", "--max_length", "256", "--activation_offloading", "true")
    assert plan("sft", folder, *flags) == 0
    output = capsys.readouterr().out
    assert output.startswith("Fits gpu_memory: ") and longest_of(output) > 1.5 * short
    expected = f"Memory allows {longest_of(output):,} tokens; the model was made for 512 positions."
    assert expected in words(output)


@pytest.mark.parametrize(
    "method, flags",
    [
        ("sft", ("--max_length", "128")),
        ("reward", ("--max_length", "128")),
        ("dpo", ("--max_length", "128", "--prompt_tokens", "0")),
        ("kto", ("--max_length", "128", "--per_device_train_batch_size", "2")),
        ("grpo", ("--num_generations", "4", "--per_device_train_batch_size", "4", "--prompt_tokens", "64")),
        ("ppo", ("--prompt_tokens", "16")),
    ],
)
def test_other_methods_and_prompts_and_an_adapter(method, flags, folder, capsys):
    assert plan(method, folder, "--use_peft", "--lora_r", "4", *flags) == 0
    printed = words(capsys.readouterr().out)
    assert f"Simulated, not measured, of {folder}: {method}, LoRA r=4" in printed
    assert re.search(r"Fused layers: .*\d LlamaMLP, \d LlamaRMSNorm", printed)


def test_layers_that_are_not_fused(folder, capsys):
    assert plan("sft", folder, "--max_length", "64", "--fused_layers", "False") == 0
    assert "Fused layers: none, by fused_layers=False." in words(capsys.readouterr().out)


def test_layers_that_need_no_checkpointing_on_a_gpu(folder, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.planning.comparisons.longest_context", lambda *_: Longest(64, None))
    flags = ("--max_length", "128", "--gpu_memory", "4GiB")
    assert plan("sft", folder, *flags) == 0
    printed = capsys.readouterr().out
    assert "let 2 of 2 layers go uncheckpointed." in printed
    assert plan("sft", folder, *flags, "--use_cpu") == 0
    assert "uncheckpointed" not in capsys.readouterr().out


def test_what_makes_a_step_fit():
    def row(name, size):
        return Row(name, Peak({WEIGHTS: size}, "forward"))

    rows = [
        row("this plan", 9 * GIB),
        row("tiled_mlp=4096", 7 * GIB),
        row("dtype=bfloat16", 5 * GIB),
        row("x", 8 * GIB),
    ]
    assert verdict(rows[0].peak, 8 * GIB, None) == (
        "Does not fit gpu_memory: 9.00 of 8.00 GiB for tensors, 1.00 GiB too much."
    )
    assert remedies(rows, 7 * GIB) == "Fits with dtype=bfloat16 (5.00 GiB) or tiled_mlp=4096 (7.00 GiB)."
    assert remedies(rows, GIB).startswith("No single switch makes it fit")


def test_a_config_file_and_built_in_shapes(folder, capsys):
    assert plan("sft", folder / "config.json", "--max_length", "64") == 0
    capsys.readouterr()
    for flags in (["plan", "--help"], ["plan"]):
        assert main(flags) == 0
        assert "llama-3.1-8b" in capsys.readouterr().out


def test_a_training_file_is_planned_as_it_trains(folder, tmp_path, capsys, monkeypatch):
    """Names, values and defaults are those of training: its own dataclasses read them."""
    monkeypatch.setattr("trl_fast.planning.comparisons.longest_context", lambda *_: Longest(64, None))
    yaml = tmp_path / "training.yaml"
    yaml.write_text(
        f"model_name_or_path: {folder}\ndataset_name: nowhere.jsonl\noutput_dir: out\nmax_length: 128\n"
        "use_peft: true\nlora_r: 4\nbf16: true\nper_device_train_batch_size: 2\nlearning_rate: 1.0e-5\n"
    )
    flags = ("--gpu", "h100-80", "--compare", "false", "--num_processes", "2")
    assert main(["plan", "dpo", "--config", str(yaml), *flags]) == 0
    output = words(capsys.readouterr().out)
    assert output.startswith("Fits NVIDIA H100 SXM: ")
    assert "LoRA r=4, float32 weights, bf16 autocast, 2 pairs of 128 tokens" in output
    assert "The dataset is not read" in output


def test_setups_have_the_defaults_of_training(folder, monkeypatch):
    # What this machine multiplies does not matter for another.
    monkeypatch.setattr("trl_fast.trainers.base.config.machine_has_bf16", lambda: False)
    model = ["--model_name_or_path", str(folder)]
    setup = read_arguments("grpo", [*model, "--num_gpus", "8", "--per_device_train_batch_size", "1"]).setup
    assert (setup.dtype, setup.bf16, setup.gradient_checkpointing, setup.num_generations) == ("float32", True, True, 8)
    assert setup.max_length == 512 + 512 and setup.prompt_share == 0.5 and setup.num_gpus == 8
    quantized = ["--load_in_4bit", "--use_peft", "--use_bnb_nested_quant", "--optim", "adamw_bnb_8bit", "--fp16"]
    setup = read_arguments("sft", [*model, *quantized]).setup
    assert (setup.quantization, setup.nested_quantization, setup.bf16) == ("4bit", True, True)
    assert setup.optim == "adamw_bnb_8bit" and setup.per_device_train_batch_size == 8


@pytest.mark.parametrize(
    ("config", "engine", "num_gpus"),
    [
        ("zero3", "zero3", 8),
        ("multi_gpu", "ddp", 8),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_processes": 4}, "fsdp2", 4),
        ({"distributed_type": "FSDP", "fsdp_config": {}, "num_processes": 4}, "fsdp1", 4),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}, "num_processes": 16}, "zero1", 16),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2}, "ddp", 2),
    ],
    ids=str,
)
def test_an_accelerate_config_says_how_gpus_share_the_run(config, engine, num_gpus, folder, tmp_path):
    flags = ["--model_name_or_path", str(folder), *ONE]
    if isinstance(config, str):
        flags += ["--num_gpus", "8", "--accelerate_config", config]
    else:
        file = tmp_path / "accelerate.yaml"
        file.write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", "use_cpu": False, **config}))
        flags += ["--accelerate_config", str(file)]
    setup = read_arguments("sft", flags).setup
    assert (setup.engine, setup.num_gpus, setup.per_device_train_batch_size) == (engine, num_gpus, 1)


@pytest.mark.slow
@pytest.mark.slow
def test_what_a_rank_sends_and_which_engines_cost_what(folder, capsys, monkeypatch):
    only = ("accelerate_config=multi_gpu", "per_device_train_batch_size=2, gradient_accumulation_steps=1")
    monkeypatch.setattr(
        "trl_fast.cli.plan.switches",
        lambda *given: [row for row in switches(*given) if row[0] in ("this plan", *only)],
    )
    flags = ("--num_gpus", "4", "--accelerate_config", "fsdp2", "--gpu", "a100-80", "--max_length", "64")
    flags += ("--gradient_accumulation_steps", "2")
    assert main(["plan", "sft", "--model_name_or_path", str(folder), *ONE, *flags]) == 0
    output = words(capsys.readouterr().out)
    assert "On the wire: 0.00 GB that each GPU sends in a step (all-gather 0.00, reduce-scatter 0.00)" in output
    assert "over NVLink at 240 GB/s" in output and "shared by 4 GPUs (FSDP2)" in output
    assert "the wire" in output and "accelerate_config=multi_gpu" in output
    assert "per_device_train_batch_size=2," in output and "gradient_accumulation_steps=1" in output


# ---- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--max_length", "1"), "max_length=1: expected at least 2 tokens"),
        (("--max_length", "none"), "max_length is unset, so sequences have no limit; give the length to plan for"),
        (("--prompt_tokens", "64", "--max_length", "64"), "prompt_tokens=64: expected a number from 0 to below"),
        (("--gpu_memory", "plenty"), "gpu_memory='plenty': expected a size above zero such as 80GiB"),
        (("--gpu_memory", "1MiB"), "does not fit at any length: 0.00 GiB cannot hold what is there all the time"),
        (("--gpu", "h100-81"), "gpu='h100-81' is unknown; did you mean 'h100-80'"),
        (("--num_gpus", "0"), "num_gpus: expected an integer >= 1, got 0"),
        (
            ("--num_gpus", "2", "--accelerate_config", "zero4"),
            "accelerate_config='zero4': expected a file or one",
        ),
        (
            ("--accelerate_config", "fsdp2"),
            "accelerate_config='fsdp2' shares a run over GPUs; say over how",
        ),
        (("--num_gpus", "2", "--plot", "x.png"), "plot='x.png' shows one device that holds everything"),
        (("--load_in_4bit",), "weights in 4bit cannot train: give use_peft=True"),
        (("--tiled_mlp", "-3"), "tiled_mlp: expected an integer >= 1 or None, got -3; True: 4096 tokens"),
        (("--tiled_mlp", "many"), "tiled_mlp: expected an integer >= 1 or None, got 'many'"),
        (("--lora_r", "0", "--use_peft"), "lora_r: expected an integer >= 1, got 0"),
        (("--use_peft", "--lora_target_modules", "q_projection"), "q_projection"),
        (("--max_lenght", "64"), "unknown argument --max_lenght; did you mean 'max_length'?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_message_before_anything_is_simulated(flags, message, folder, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.planning.peak_estimates.simulate", None)
    assert plan("dpo", folder, *flags) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_sft_does_not_have(folder, capsys):
    assert plan("sft", folder, "--prompt_tokens", "8") == 2
    assert "prompt_tokens=8 has no meaning for sft" in capsys.readouterr().err
    assert plan("sft", folder, "--batch_layout", "shared_prefix") == 2
    assert "batch_layout='shared_prefix' cannot be used" in capsys.readouterr().err


def test_unknown_methods_and_choices_are_named_with_the_known_ones(folder, capsys):
    assert main(["plan", "dqo"]) == 2
    assert "method 'dqo' is unknown; did you mean 'dpo'" in capsys.readouterr().err
    for flag, value in (("--batch_layout", "ragged"), ("--dtype", "int8")):
        with pytest.raises(SystemExit):
            plan("dpo", folder, flag, value)
        assert f"invalid choice: '{value}' (choose from" in capsys.readouterr().err


def test_models_that_are_unknown_or_no_decoders(tmp_path, capsys):
    assert main(["plan", "dpo"]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err
    assert plan("dpo", "llama-3.1-8") == 2
    error = capsys.readouterr().err
    assert "model_name_or_path='llama-3.1-8' is no built-in shape" in error and "did you mean 'llama-3.1-8b'" in error
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert plan("dpo", tmp_path) == 2
    assert "(t5) is no language model of decoder layers alone" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert plan("dpo", tmp_path, "--tiled_mlp", "64") == 2
    assert "tiled_mlp=64: MambaForCausalLM has no MLP that can be tiled" in capsys.readouterr().err


def test_lengths_beyond_the_models_positions(folder, tmp_path, capsys, caplog):
    tiny_config("gpt2", max_position_embeddings=40).save_pretrained(tmp_path)
    assert plan("dpo", tmp_path, "--max_length", "41") == 2
    assert "GPT2LMHeadModel has a table of 40 positions" in capsys.readouterr().err
    assert plan("dpo", folder, "--max_length", "513") == 0
    assert "more than the 512 positions that LlamaForCausalLM was made for" in caplog.text


def test_a_plan_of_distillation_has_its_teacher(folder, tmp_path, capsys):
    tiny_config("llama", num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    named = ("--teacher_model_name_or_path", str(tmp_path / "teacher"), "--use_cpu", "--max_completion_length", "16")
    assert plan("distillation", folder, *named, "--prompt_tokens", "16") == 0
    assert f"Teacher: {tmp_path / 'teacher'}, float32 weights." in words(capsys.readouterr().out)
    assert plan("gkd", folder, "--use_cpu", "--lmbda", "0", "--prompt_tokens", "16") == 0
    out = words(capsys.readouterr().out)
    assert "No teacher is named (teacher_model_name_or_path): one as large" in out
    assert "sampled at a time" not in out and "vLLM" not in out
    assert plan("distillation", folder, "--teacher_model_name_or_path", str(folder), "--use_cpu") == 2
    assert "is the model that is trained" in capsys.readouterr().err


def test_a_plan_with_images_says_how_many_tokens_they_have(tmp_path, capsys):
    folder = save_tiny_vision_model(tmp_path, "llava")
    size = ("--image_size", "56x56", "--images_per_prompt", "2")
    assert plan("dpo", folder, "--max_length", "64", "--use_cpu", *size) == 0
    assert "1 pair of 64 tokens, 32 of 2 images" in words(capsys.readouterr().out)
    assert plan("dpo", folder, "--max_length", "33", "--use_cpu", *size) == 2
    assert "max_length=33 cuts the images of a sequence, which have 32 tokens" in words(capsys.readouterr().err)
    assert plan("ppo", folder, *size) == 2
    named = "image_size='56x56' has no plan for ppo; plans of images are for sft, dpo, reward, kto,"
    assert named in words(capsys.readouterr().err)


@pytest.mark.parametrize("method", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_plan_of_sampled_completions_on_images(method, tmp_path, capsys):
    folder = save_tiny_vision_model(tmp_path, "llava")
    arguments = ("--per_device_train_batch_size", "8", "--max_completion_length", "16", "--prompt_tokens")
    assert plan(method, folder, *arguments, "20", "--image_size", "56x56", "--use_cpu") == 0
    out = words(capsys.readouterr().out)
    assert "8 completions of 36 tokens, 16 of 1 image, 8 sampled at a time" in out
    assert "images " in out and "pixels of the batches that are there" in out


@pytest.mark.slow
def test_a_plan_of_rewards_on_images_says_what_trl_has_not(tmp_path, capsys):
    folder = save_tiny_vision_model(tmp_path, "llava")
    arguments = ("--max_length", "64", "--image_size", "56x56", "--use_cpu", "--compare", "true")
    assert plan("reward", folder, *arguments) == 0
    out = words(capsys.readouterr().out)
    assert "1 pair of 64 tokens, 16 of 1 image" in out
    assert "Left out, TRL 1.16: its reward trainer reads no images" in out and "By other systems" not in out
