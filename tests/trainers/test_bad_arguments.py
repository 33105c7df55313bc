"""Wrong arguments of configs and trainers from Python: an error at construction that names argument and value."""

import dataclasses
import math
import typing
from enum import Enum

import datasets
import pytest
import torch
import trl
from peft import LoraConfig

import trl_fast
from support.missing_packages import hide_packages
from support.training import color_labels, color_pairs
from trl_fast.trainers.methods import METHODS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
CONFIGS = {method.name: method.config_class() for method in METHODS.values()}
DATA = {"sft": color_pairs(4).rename_columns({"chosen": "completion"}), "dpo": color_pairs(4), "kto": color_labels(8)}
DATA |= {"reward": color_pairs(4)}


def trainer(method, folder, /, **arguments):
    args = arguments.pop("args", None) or CONFIGS[method](str(folder), **CPU, per_device_train_batch_size=2)
    taken = {"train_dataset": DATA[method], "args": args, **arguments}
    return METHODS[method].trainer_class()(**taken)


# The argument, its value, the error, and what the message names.
WRONG = [
    ("model", None, TypeError, "model: expected a hub name, a folder, .* got NoneType"),
    ("model", 7, TypeError, "model: expected a hub name, .* got int"),
    ("model", torch.nn.Linear(2, 2), TypeError, "model: expected .* got Linear"),
    ("train_dataset", None, ValueError, "train_dataset is required"),
    ("train_dataset", [{"prompt": "a"}], TypeError, "train_dataset: expected a datasets.Dataset .* got list"),
    ("train_dataset", "pairs.jsonl", TypeError, "train_dataset: expected a datasets.Dataset .* got str"),
    ("train_dataset", datasets.DatasetDict(), TypeError, "train_dataset: expected .* got DatasetDict"),
    ("eval_dataset", [{"prompt": "a"}], TypeError, "expected a datasets.Dataset .* got list"),
    ("args", {"beta": 0.3}, TypeError, "args: expected a .*Config, got dict"),
    ("args", "run", TypeError, "args: expected a .*Config, got str"),
    ("processing_class", "gpt2", TypeError, "processing_class: expected a tokenizer, got str"),
    ("processing_class", lambda text: text, TypeError, "processing_class: expected a tokenizer, got function"),
    ("peft_config", {"r": 4}, TypeError, "peft_config: expected a peft.PeftConfig, got dict"),
    ("peft_config", LoraConfig(target_modules=["no_proj"]), ValueError, "peft_config: .*'no_proj'"),
    ("callbacks", [object()], TypeError, "callbacks: expected transformers.TrainerCallback, got object"),
    ("callbacks", [dict], TypeError, "callbacks: expected transformers.TrainerCallback, got dict"),
    ("callbacks", print, TypeError, "callbacks: expected a list of transformers.TrainerCallback, got builtin"),
    ("data_collator", [1], TypeError, "data_collator: expected a function, got list"),
    ("compute_metrics", {"a": 1}, TypeError, "compute_metrics: expected a function, got dict"),
    ("optimizers", torch.optim.SGD, TypeError, "optimizers: expected an optimizer and a scheduler"),
    ("optimizers", (None,), TypeError, "optimizers: expected an optimizer and a scheduler"),
    ("learning_rat", 1e-3, TypeError, "has no argument 'learning_rat'.*did you mean 'learning_rate'"),
]


@pytest.mark.parametrize("method", DATA)
@pytest.mark.parametrize(
    "name, value, kind, message", WRONG, ids=[f"{name}={value!r:.20}" for name, value, *_ in WRONG]
)
def test_wrong_arguments_of_trainers(method, name, value, kind, message, model_path, tmp_path):
    with pytest.raises(kind, match=message):
        trainer(method, tmp_path, **{"model": model_path, name: value})


@pytest.mark.parametrize("method", DATA)
def test_the_config_of_another_trainer(method, model_path, tmp_path):
    for other in CONFIGS.values():
        if not issubclass(other, CONFIGS[method]):
            args = other(str(tmp_path), **CPU)
            with pytest.raises((TypeError, ValueError), match=f"args: .*{other.__name__}"):
                trainer(method, tmp_path, model=model_path, args=args)
    theirs = trl.RLOOConfig(str(tmp_path), **CPU)
    with pytest.raises((TypeError, ValueError), match="args: .*RLOOConfig"):
        trainer(method, tmp_path, model=model_path, args=theirs)


@pytest.mark.parametrize(
    "name, value", [("learning_rate", math.nan), ("max_grad_norm", -1), ("warmup_steps", math.inf)]
)
def test_arguments_that_are_changed_before_training(name, value, model_path, tmp_path):
    made = trainer("dpo", tmp_path, model=model_path)
    setattr(made.args, name, value)
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        made.train()
    assert made.state.global_step == 0


def choice_fields(owner):
    """The fields that take one of several names, and such a name."""
    hints = typing.get_type_hints(owner)
    for item in dataclasses.fields(owner):
        choices = item.metadata.get("choices")
        for part in typing.get_args(hints[item.name]):
            if isinstance(part, type) and issubclass(part, Enum):
                choices = [member.value for member in part]
        if choices and item.init:
            yield item.name, [str(choice) for choice in choices]


@pytest.mark.parametrize("method", CONFIGS)
def test_every_choice_names_what_was_meant(method, tmp_path):
    found = list(choice_fields(CONFIGS[method]))
    assert len(found) >= 12
    for name, choices in found:
        longest = max(choices, key=len)
        with pytest.raises(ValueError) as error:
            CONFIGS[method](str(tmp_path), **{**CPU, name: f"{longest}x"})
        message = str(error.value)
        assert message.startswith(f"{name}={longest + 'x'!r} is unknown; expected one of "), message
        assert choices[0] in message, message


TYPES = [
    (
        {"gradient_checkpointing": "false"},
        "gradient_checkpointing: expected True or False, got 'false'; a text counts",
    ),
    ({"use_cpu": None}, "use_cpu: expected True or False, got None"),
    ({"disable_dropout": 2}, "disable_dropout: expected True or False, got 2"),
    ({"run_name": ["a", "b"]}, r"run_name: expected one text, got \['a', 'b'\]"),
    ({"hub_model_id": {"a": 1}}, "hub_model_id: expected one text, got {'a': 1}"),
    ({"model_init_kwargs": "nonsense"}, "model_init_kwargs: expected a map in JSON such as .*, got 'nonsense'"),
    ({"model_init_kwargs": "{a: 1}"}, "model_init_kwargs: no valid JSON at column 2"),
    ({"lr_scheduler_kwargs": [1]}, r"lr_scheduler_kwargs: expected a map .* got \[1\]"),
    ({"accelerator_config": "nothing.json"}, "accelerator_config: expected a map in JSON .* got 'nothing.json'"),
]


@pytest.mark.parametrize("settings, message", TYPES, ids=[str(settings) for settings, _ in TYPES])
def test_wrong_types_of_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_fast.SFTConfig(str(tmp_path), **{**CPU, **settings})


def test_types_that_only_look_different_are_taken(tmp_path):
    made = trl_fast.SFTConfig(tmp_path, **CPU, gradient_checkpointing=0, run_name=7, resume_from_checkpoint=True)
    assert (made.gradient_checkpointing, made.run_name, made.resume_from_checkpoint) == (False, "7", "True")


def test_missing_packages_are_named_when_a_trainer_is_made(model_path, tmp_path, monkeypatch):
    hide_packages(monkeypatch, "deepspeed", "bitsandbytes")
    for settings, message in (
        ({"optim": "adamw_8bit"}, "optim='adamw_8bit': .*pip install -U bitsandbytes"),
        ({"report_to": "wandb"}, r"report_to=\['wandb'\]: .*pip install wandb"),
    ):
        args = CONFIGS["dpo"](str(tmp_path), **{**CPU, **settings})
        with pytest.raises(ImportError, match=message):
            trainer("dpo", tmp_path, model=model_path, args=args)
    with pytest.raises(ImportError, match=r"deepspeed=.*`pip install 'trl-fast\[deepspeed\]'`"):
        CONFIGS["dpo"](str(tmp_path), **CPU, deepspeed={"train_batch_size": 2})
