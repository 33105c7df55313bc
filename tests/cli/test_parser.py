"""Flags and YAML, which of them wins, and where a mistake is."""

import dataclasses
import os
import shlex

import pytest
import trl
import yaml

import trl_fast
from trl_fast.cli.arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl_fast.cli.parser import TrlParser
from trl_fast.cli.training import make_parser
from trl_fast.dropin.helpers import scripts
from trl_fast.trainers.methods import METHODS

BASE = ["--output_dir", "/tmp/none", "--use_cpu", "true", "--bf16", "false"]


def parse(*flags, **options):
    return make_parser(METHODS["dpo"]).parse_args_and_config([*BASE, *flags], **options)


def write(tmp_path, text=None, **values):
    path = tmp_path / "config.yaml"
    path.write_text(text or yaml.safe_dump(values))
    return ["--config", str(path)]


def test_flags_reach_their_groups():
    script, training, model, mixture, _ = parse(
        *shlex.split(
            "--dataset_name data.jsonl --dataset_train_split train[:90%] --beta 0.3 --loss_type ipo sft "
            "--loss_weights 1 0.5 --model-name-or-path m --use_peft --lora_r=4 --max-length none --report_to none "
            "--padding_free --no_disable_dropout --precompute_ref_log_probs false --test_split_size 0.1 "
            """--dataset_config en --gradient_checkpointing_kwargs '{"use_reentrant": true}'"""
        )
    )
    assert (script.dataset_name, script.dataset_train_split) == ("data.jsonl", "train[:90%]")
    assert script.dataset_config == "en" and mixture.test_split_size == 0.1
    assert (training.beta, training.loss_type, training.loss_weights) == (0.3, ["ipo", "sft"], [1.0, 0.5])
    assert training.max_length is None and training.report_to == []
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert (training.padding_free, training.disable_dropout, training.precompute_ref_log_probs) == (True, False, False)
    assert (model.model_name_or_path, model.use_peft, model.lora_r) == ("m", True, 4)


@pytest.mark.parametrize(("flags", "value"), [([], None), (["--tf32"], True), (["--tf32", "none"], None)])
def test_a_truth_value_that_may_be_none_is_true_without_a_value(flags, value):
    parser = make_parser(METHODS["dpo"])
    assert vars(parser.parse_args([*flags, "--tf32", "false"]))["tf32"] is False
    assert vars(parser.parse_args(flags))["tf32"] is value


@pytest.mark.parametrize(
    ("flags", "value"),
    [("", "auto"), ("--fused_layers", True), ("--fused-layers true", True), ("--fused_layers False", False)],
)
def test_a_name_or_a_truth_value(flags, value, tmp_path):
    assert parse(*flags.split())[1].fused_layers is value
    assert parse(*write(tmp_path, fused_layers=value))[1].fused_layers is value


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
        lora_target_modules="q_proj",
        max_length=None,
        eval_strategy=False,
        datasets=[{"path": "a", "fraction": 0.5}, {"path": "b", "columns": ["prompt"]}],
        env={"TRL_FAST_TEST_VARIABLE": 7},
    )
    _, training, model, mixture, _ = parse(*config, "--beta", "0.2")
    assert training.beta == 0.2 and training.learning_rate == 5e-7 and training.loss_type == ["hinge"]
    assert training.max_length is None and training.model_init_kwargs == {"attn_implementation": "sdpa"}
    assert training.eval_strategy == "no"
    assert model.model_name_or_path == "from-yaml" and model.use_peft and model.lora_target_modules == ["q_proj"]
    assert [(item.path, item.fraction, item.columns) for item in mixture.datasets] == [
        ("a", 0.5, None),
        ("b", None, ["prompt"]),
    ]
    assert os.environ["TRL_FAST_TEST_VARIABLE"] == "7"
    monkeypatch.delenv("TRL_FAST_TEST_VARIABLE")


@pytest.mark.parametrize(
    "text, message",
    [
        ("beta: 0.1\nbeeta: 1", "line 2: beeta is an unknown key; did you mean 'beta'?"),
        ("\nlearning_rate: fast", "line 2: learning_rate: 'fast': could not convert string to float"),
        ("max_length: 1.5", "line 1: max_length: 1.5: invalid literal for int"),
        ("use_peft: perhaps", "line 1: use_peft: 'perhaps'"),
        ("beta:\n- 1", "line 1: beta: [1]"),
        ("dtype: float8", "line 1: dtype: 'float8': expected one of auto"),
        ("beta: 1\nloss_type: [sigmoyd]", "line 2: loss_type"),
        ("beta: -1", "line 1: beta"),
        ("loss_type: [ipo]\nbeta: .nan", "line 2: beta: expected a finite number >= 0, got nan; left out, it is 0.1"),
        ("save_strategy: steps\nsave_steps: -1", "line 2: save_steps: expected a finite number >= 0, got -1.0; "),
        ("beta: 1\nbeta: 2", "line 2: beta is given twice, first on line 1"),
        ("datasets:\n- path: a\n- pth: b", "line 3: datasets.1.pth is unknown; did you mean 'path'?"),
        ("datasets:\n- name: a", "line 1: datasets.0: path is missing"),
        ("beta: [1", "line 1: no valid YAML"),
        ("env: [a]", "line 1: env must be a map"),
        ("- a", "expected a map"),
    ],
)
def test_a_mistake_in_yaml_is_named_with_file_line_and_key(text, message, tmp_path):
    with pytest.raises(ValueError) as error:
        parse(*write(tmp_path, text))
    assert message in str(error.value) and str(tmp_path / "config.yaml") in str(error.value)


def test_a_bad_flag_is_not_blamed_on_the_file_that_has_the_key_too(tmp_path):
    with pytest.raises(ValueError, match="loss_type") as error:
        parse(*write(tmp_path, "loss_type: [ipo]"), "--loss_type", "sigmoyd")
    assert "config.yaml" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="missing.yaml: there is no such file"):
        parse("--config", str(tmp_path / "missing.yaml"))


def test_unknown_flags_are_named_or_come_back(tmp_path):
    with pytest.raises(ValueError, match="unknown argument --lerning-rate; did you mean 'learning_rate'?"):
        parse("--lerning-rate", "1")
    with pytest.raises(ValueError, match="unexpected arguments stray"):
        parse("stray")


@dataclasses.dataclass
class Arguments:
    count: int
    name: str = "alpha"


PARSER_CALLS = {
    "flags": (["--count", "5", "--name", "beta"], {}),
    "file": (["--config", "CONFIG"], {"fail_with_unknown_args": False}),
    "flag before file": (["--count", "5", "--config", "CONFIG"], {"fail_with_unknown_args": False}),
    "remaining": (["--config", "CONFIG", "--other", "1"], {"return_remaining_strings": True}),
    "separate": (
        ["--config", "CONFIG", "--other", "1"],
        {"return_remaining_strings": True, "separate_remaining_strings": True},
    ),
    "unknown key": (["--config", "CONFIG"], {}),
    "unknown flag": (["--count", "5", "--other", "1"], {}),
    "unknown flag, forgiven": (["--count", "5", "--other", "1"], {"fail_with_unknown_args": False}),
}


@pytest.mark.parametrize("case", PARSER_CALLS)
def test_the_parser_does_what_trls_does(case, tmp_path):
    _, path = write(tmp_path, count=3, unknown="x", env={"TRL_FAST_TEST_VARIABLE": "1"})
    flags, options = PARSER_CALLS[case]
    flags = [path if flag == "CONFIG" else flag for flag in flags]
    results = []
    for parser_class in (TrlParser, trl.TrlParser):
        try:
            results.append(parser_class(Arguments).parse_args_and_config(flags, **options))
        except ValueError:
            results.append(ValueError)
    os.environ.pop("TRL_FAST_TEST_VARIABLE", None)
    assert results[0] == results[1]


def test_flags_that_a_script_adds_come_back():
    parser = TrlParser(Arguments)
    parser.add_argument("--extra")
    *_, namespace = parser.parse_args_and_config(["--count", "1", "--extra", "2"])
    assert namespace.extra == "2"


def test_a_field_named_config_is_refused():
    made = dataclasses.make_dataclass("WithConfig", [("config", str, "a")])
    with pytest.raises(ValueError, match="WithConfig has a field named config"):
        TrlParser(made)


def flag_names(*classes):
    return {action.dest for action in TrlParser(classes)._actions}


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "RewardConfig"])
def test_trls_flags_are_all_there(name):
    theirs = flag_names(trl.ScriptArguments, getattr(trl, name), trl.ModelConfig, trl.DatasetMixtureConfig)
    ours = flag_names(ScriptArguments, getattr(trl_fast, name), ModelConfig, DatasetMixtureConfig)
    assert theirs - ours == set()


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig"])
@pytest.mark.parametrize("settings", [{}, {"max_length": 77, "eos_token": "<x>", "pad_to_multiple_of": 8}])
def test_every_value_of_trls_config_is_taken_over(name, settings, tmp_path):
    theirs = getattr(trl, name)(str(tmp_path), use_cpu=True, bf16=False, **settings)
    ours = getattr(trl_fast, name).from_any(theirs).to_dict()
    expected = theirs.to_dict() | {"pad_to_multiple_of": settings.get("pad_to_multiple_of")}
    expected["logging_nan_inf_filter"] = False
    # Beside the hub's token, TRL's takes a tokenizer's for a secret.
    expected |= {key: getattr(theirs, key) for key in ("eos_token", "pad_token") if hasattr(theirs, key)}
    assert {key: ours[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "RewardConfig"])
def test_older_and_unknown_names_of_every_config(name, tmp_path):
    config_class = getattr(trl_fast, name)
    with pytest.raises(TypeError, match=f"{name} has no field 'lerning_rate'; did you mean 'learning_rate'?"):
        config_class(str(tmp_path), lerning_rate=1)
    with pytest.warns(FutureWarning, match=f"{name}: `evaluation_strategy`"):
        config_class(str(tmp_path), use_cpu=True, bf16=False, evaluation_strategy="no")


@dataclasses.dataclass
class Sizes:
    height: float
    name: str = "gamma"


SUB_COMMANDS = {
    "one": ["one", "--count", "5"],
    "other": ["--verbose", "other", "--height", "2.5", "--name", "delta"],
    "file": ["other", "--config", "CONFIG"],
    "file, flag wins": ["one", "--count", "7", "--config", "CONFIG"],
    "file before": ["--config", "CONFIG", "one"],
    "missing": ["one"],
    "unknown flag": ["one", "--count", "5", "--other", "1"],
}


@pytest.mark.parametrize("case", SUB_COMMANDS)
def test_sub_commands_are_parsed_as_trls_are(case, tmp_path):
    _, path = write(tmp_path, count=3, height=1.5)
    flags = [path if flag == "CONFIG" else flag for flag in SUB_COMMANDS[case]]
    results = []
    for parser_class in (TrlParser, trl.TrlParser):
        parser = parser_class(prog="script")
        parser.add_argument("--verbose", action="store_true")
        commands = parser.add_subparsers(dest="command")
        commands.add_parser("one", dataclass_types=[Arguments])
        commands.add_parser("other", dataclass_types=[Sizes])
        try:
            results.append([vars(parsed) for parsed in parser.parse_args_and_config(flags)])
        except (ValueError, SystemExit) as error:
            results.append(type(error))
    assert results[0] == results[1]


def test_a_sub_command_of_a_method():
    parser = TrlParser(prog="script")
    commands = parser.add_subparsers(dest="command")
    scripts.make_parser("dpo", commands)
    (parsed,) = parser.parse_args_and_config(["dpo", *BASE, "--beta", "0.3", "--trust_remote_code"])
    assert (parsed.command, parsed.beta, parsed.trust_remote_code) == ("dpo", 0.3, True)
    alone = scripts.make_parser("dpo", prog="dpo.py")
    _, training, model, _ = alone.parse_args_and_config([*BASE, "--beta", "0.3", "--trust_remote_code"])
    assert training.beta == 0.3 and model.trust_remote_code and alone.prog == "dpo.py"


def test_defaults_by_name():
    parser = TrlParser([Arguments])
    assert parser.set_defaults_with_config(count="4", other=[1]) == ["--other", "[1]"]
    assert parser.parse_args_and_config([]) == (Arguments(count=4),)
    with pytest.raises(ValueError, match="^count: 'many': invalid literal for int"):
        parser.set_defaults_with_config(count="many")
