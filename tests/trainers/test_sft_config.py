"""SFTConfig: TRL's fields and defaults, older names, and values that are refused."""

import dataclasses
import warnings

import pytest
import trl
from transformers import HfArgumentParser

import trl_fast
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.trainers.base.config import OTHER_DEFAULTS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(folder, **settings):
    return trl_fast.SFTConfig(str(folder), **CPU, **settings)


def test_every_field_of_trl_is_there_with_its_default(tmp_path):
    theirs = trl.SFTConfig(str(tmp_path), **CPU)
    ours = config(tmp_path)
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in OTHER_DEFAULTS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


OLDER = {
    "max_seq_length": 8,
    "use_liger": True,
    "dataset_batch_size": 100,
    "num_of_sequences": 512,
    "chars_per_token": 3.6,
    "truncation_mode": "keep_end",
    "packing_strategy": "ffd",
    "loss_type": "chunked_nll",
    "dataset_kwargs": {"add_special_tokens": False},
}
NOW = {"max_seq_length": ("max_length", 8), "packing_strategy": ("packing_strategy", "bfd"), "loss_type": ("loss_type", "nll")}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("name", OLDER)
def test_an_older_name_gives_one_line_and_no_error(name, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = config(tmp_path, **{name: OLDER[name]})
    lines = [str(warning.message) for warning in seen if "older TRL" in str(warning.message)]
    assert len(lines) == 1 and lines[0].startswith(f"SFTConfig: `{name}")
    field, value = NOW.get(name, (name, getattr(made, name)))
    assert getattr(made, field) == value


def test_bfd_requeue_is_now_called_bfd_split(tmp_path):
    with pytest.warns(FutureWarning, match="bfd_split"):
        assert config(tmp_path, packing_strategy="bfd-requeue").packing_strategy == "bfd_split"


OLDER_ARGUMENTS = {
    "max_seq_length": ("max_length", 9),
    "packing": ("packing", True),
    "dataset_text_field": ("dataset_text_field", "text"),
    "dataset_num_proc": ("dataset_num_proc", 1),
    "num_of_sequences": (None, 9),
    "infinite": (None, True),
}


@pytest.mark.parametrize("name", OLDER_ARGUMENTS)
def test_an_older_argument_of_the_trainer_gives_one_line_and_no_error(name, model_path, tmp_path):
    field, value = OLDER_ARGUMENTS[name]
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 4), name: value}
    with pytest.warns(FutureWarning, match=f"(SFTTrainer|SFTConfig): `{name}` is a name of an older TRL") as seen:
        trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments)
    assert sum("older TRL" in str(warning.message) for warning in seen) == 1
    assert field is None or getattr(trainer.args, field) == value
    assert name != "packing" or "seq_lengths" in trainer.train_dataset.column_names
    assert name != "max_seq_length" or max(map(len, trainer.train_dataset["input_ids"])) == 9


def test_the_tokenizer_under_its_older_name(model_path, tmp_path, tokenizer):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 4), "tokenizer": tokenizer}
    with pytest.warns(FutureWarning, match="SFTTrainer: `tokenizer`"):
        trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments)
    assert trainer.processing_class is tokenizer


REFUSED = [
    ({"loss_type": "mse"}, "loss_type='mse' is unknown; expected one of nll, dft"),
    ({"packing_strategy": "best"}, "packing_strategy='best' is unknown; expected one of bfd, bfd_split, wrapped"),
    ({"truncation_mode": "middle"}, "truncation_mode='middle'"),
    ({"packing": True, "max_length": None}, "packing needs the length.*max_length is None"),
    ({"eval_packing": True, "max_length": None}, "max_length is None"),
    ({"max_length": 0}, "max_length: expected an integer >= 1 or None, got 0; None is no limit"),
    ({"padding_free": True, "batch_layout": "padded"}, "padding_free=True contradicts batch_layout='padded'"),
    ({"activation_budget_bytes": -1}, "activation_budget_bytes: expected an integer >= 0 or None, got -1"),
    (
        {"activation_budget_bytes": 5, "gradient_checkpointing": False},
        "activation_budget_bytes=5 is of use with gradient_checkpointing=True only",
    ),
    (
        {"gradient_checkpointing_kwargs": {"selective": True}, "gradient_checkpointing": False},
        "'selective': True} is of use with gradient_checkpointing=True only",
    ),
    (
        {"gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": True}},
        "'selective': True} needs use_reentrant=False",
    ),
    ({"dataset_kwargs": {"skip": True}}, "dataset_kwargs: 'skip' is unknown; expected only 'skip_prepare_dataset'"),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"activation_offloading": True}, 0),
        ({"activation_offloading": True, "activation_budget_bytes": 7}, 7),
        ({"activation_budget_bytes": 0, "gradient_checkpointing": False}, 0),
    ],
    ids=str,
)
def test_the_activation_budget(settings, expected, tmp_path):
    assert config(tmp_path, **settings).activation_budget == expected


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_values_that_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_ligers_layers_are_used_but_not_its_head(tmp_path):
    made = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rms_norm": False})
    assert made.liger_kernel_config == {"rms_norm": False, "fused_linear_cross_entropy": False}
    for name in ("fused_linear_cross_entropy", "cross_entropy"):
        with pytest.raises(ValueError, match=f"'{name}': True"):
            config(tmp_path, use_liger_kernel=True, liger_kernel_config={name: True})


def test_a_config_is_read_back_from_its_dict_without_the_hubs_token(tmp_path, recwarn):
    made = config(tmp_path, eos_token="<|im_end|>", hub_token="secret").to_dict()
    assert made["hub_token"] == "<HUB_TOKEN>"
    (read,) = HfArgumentParser(trl_fast.SFTConfig).parse_dict(made, allow_extra_keys=True)
    assert read.eos_token == "<|im_end|>" and not [line for line in recwarn if "older TRL" in str(line.message)]


def test_the_config_of_trl_is_accepted(model_path, tmp_path):
    args = trl.SFTConfig(str(tmp_path), **CPU, packing=True, max_length=30, pad_to_multiple_of=8, loss_type="dft")
    trainer = trl_fast.SFTTrainer(model_path, args, train_dataset=sft_rows("text", 4))
    assert isinstance(trainer.args, trl_fast.SFTConfig) and trainer.args.loss_type == "dft"
    assert trainer.args.pad_to_multiple_of == 8 and "seq_lengths" in trainer.train_dataset.column_names


def test_without_arguments_the_output_folder_is_named_as_trl_does(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_fast.trainers.base.config.machine_has_bf16", lambda: False)
    trainer = trl_fast.SFTTrainer(model_path, train_dataset=sft_rows("text", 4))
    assert trainer.args.output_dir == f"{model_path.split('/')[-1]}-SFT"


def test_a_transformers_that_marks_nothing_beside_images_is_named(monkeypatch, tmp_path):
    settings = config(tmp_path, assistant_only_loss=True)
    settings.check_for_images(True, False, formatted=False)
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"assistant_only_loss=True is not .*; transformers 5.17.0 marks nothing"):
        settings.check_for_images(True, False, formatted=False)
    settings.assistant_turns = "separately"
    settings.check_for_images(True, False, formatted=False)
