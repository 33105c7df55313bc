"""Flags and YAML, and which of them wins."""

import os
import shlex

import pytest
import trl
import yaml
from peft import LoraConfig

from trl_fast.cli.arguments import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl_fast.cli.dpo import make_parser
from trl_fast.trainers import DPOConfig

BASE = ["--output_dir", "/tmp/none", "--use_cpu", "true", "--bf16", "false"]


def parse(*flags, **options):
    return make_parser().parse_args_and_config([*BASE, *flags], **options)


def write(tmp_path, **values):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def test_flags_reach_the_three_groups():
    script, training, model = parse(
        *shlex.split(
            "--dataset_name data.jsonl --dataset_train_split train[:90%] --beta 0.3 --loss_type ipo sft "
            "--loss_weights 1 0.5 --model-name-or-path m --use_peft --lora_r=4 --max-length none --report_to none "
            """--gradient_checkpointing_kwargs '{"use_reentrant": true}'"""
        )
    )
    assert (script.dataset_name, script.dataset_train_split) == ("data.jsonl", "train[:90%]")
    assert (training.beta, training.loss_type, training.loss_weights) == (0.3, ["ipo", "sft"], [1.0, 0.5])
    assert training.max_length is None and training.report_to == []
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert (model.model_name_or_path, model.use_peft, model.lora_r) == ("m", True, 4)


def test_yaml_gives_defaults_and_flags_win(tmp_path, monkeypatch):
    monkeypatch.delenv("TRL_FAST_TEST_VARIABLE", raising=False)
    config = write(
        tmp_path,
        beta=0.5,
        learning_rate="5e-7",
        loss_type=["hinge"],
        model_name_or_path="from-yaml",
        model_init_kwargs={"attn_implementation": "sdpa"},
        use_peft=True,
        max_length=None,
        env={"TRL_FAST_TEST_VARIABLE": 7},
    )
    _, training, model = parse(*config, "--beta", "0.2")
    assert training.beta == 0.2 and training.learning_rate == 5e-7 and training.loss_type == ["hinge"]
    assert training.max_length is None and training.model_init_kwargs == {"attn_implementation": "sdpa"}
    assert model.model_name_or_path == "from-yaml" and model.use_peft
    assert os.environ["TRL_FAST_TEST_VARIABLE"] == "7"
    monkeypatch.delenv("TRL_FAST_TEST_VARIABLE")


def test_yaml_may_bring_what_is_required(tmp_path):
    _, training, _ = make_parser().parse_args_and_config(write(tmp_path, output_dir="out", use_cpu=True, bf16=False))
    assert training.output_dir == "out"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"beeta": 1}, "unknown keys \\['beeta'\\]"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast'"),
        ({"dtype": "float8"}, "dtype: 'float8'.*expected one of"),
        ({"env": ["a"]}, "env must be a map"),
    ],
)
def test_bad_yaml_is_named(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(*write(tmp_path, **values))


def test_a_file_that_is_no_map_or_not_there(tmp_path):
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="expected a map"):
        parse("--config", str(tmp_path / "list.yaml"))
    with pytest.raises(ValueError, match="missing.yaml.*cannot be read"):
        parse("--config", str(tmp_path / "missing.yaml"))


def test_unknown_flags_end_the_program_or_come_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--beeta", "1")
    assert "--beeta" in capsys.readouterr().err
    *_, remaining = parse("--beeta", "1", return_remaining_strings=True, fail_with_unknown_args=False)
    assert remaining == ["--beeta", "1"]


def test_launcher_flags_point_to_accelerate():
    with pytest.raises(ValueError, match="accelerate launch"):
        parse("--num_processes", "2")


def flag_names(*classes):
    return {action.dest for action in TrlParser(classes)._actions}


def test_trls_flags_are_all_there():
    theirs = flag_names(trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig)
    assert theirs - flag_names(ScriptArguments, DPOConfig, ModelConfig) == set()


def test_peft_config_from_flags():
    assert get_peft_config(ModelConfig()) is None
    config = get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["all-linear"], use_dora=True))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.target_modules, config.use_dora, config.task_type) == (4, "all-linear", True, "CAUSAL_LM")


@pytest.mark.parametrize(
    "given, understood",
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*layers\.[01]\..*q_proj"], r".*layers\.[01]\..*q_proj"),
    ],
)
def test_a_lone_target_module_is_a_name_unless_it_is_a_pattern(given, understood):
    config = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=given))
    assert config.target_modules == understood


def test_quantisation_from_flags():
    assert get_quantization_config(ModelConfig()) is None
    assert get_quantization_config(ModelConfig(load_in_4bit=True)).load_in_4bit
    with pytest.raises(ValueError, match="load_in_4bit"):
        ModelConfig(load_in_4bit=True, load_in_8bit=True)
