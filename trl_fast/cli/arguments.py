"""Arguments that scripts share, and a parser that reads them from flags and YAML, as TRL's does."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import HfArgumentParser

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

# Flags of `accelerate launch` that people put on the same line.
_LAUNCHER_FLAGS = ("--accelerate_config", "--num_processes", "--num_machines", "--multi_gpu", "--main_process_port")


@dataclass
class ScriptArguments:
    """Which dataset a script works on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, folder, or JSON, JSONL, CSV or Parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on, such as train[:90%%]."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the dataset as a stream."})
    ignore_bias_buffers: bool = field(
        default=False, metadata={"help": "For DDP with models whose boolean buffers must not be synchronised."}
    )


@dataclass
class ModelConfig:
    """Which model to train, with which adapter and quantisation."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str | None = field(
        default="float32", metadata={"help": "Weights' dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale, divided by the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules to adapt."})
    lora_target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "PEFT task type."})
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit weights (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit weights (bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit format.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the quantisation constants."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Storage dtype of 4-bit weights."})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; choose one")
        # peft takes a lone string as a pattern that the whole name must match. TRL hands every lone module over so,
        # and a plain name then matches nothing.
        alone = isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1
        if alone and re.search(r"all-linear|[\\*+?()\[\]|^$]", self.lora_target_modules[0]):
            self.lora_target_modules = self.lora_target_modules[0]


def get_peft_config(model_args: ModelConfig) -> PeftConfig | None:
    """The LoRA configuration that the arguments describe; None without `use_peft`."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration that the arguments describe; None without load_in_4bit or load_in_8bit."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


class TrlParser(HfArgumentParser):
    """Parses dataclasses from flags and from a YAML file.

    `--config file.yaml`: its keys become defaults, flags win; its map `env` goes to the environment. `--max-length` is
    `--max_length`. `none` and `null` mean None.
    """

    def __init__(self, dataclass_types: type | Iterable[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", help="YAML file whose keys become defaults; flags win.")
        for action in self._actions:
            # For report_to, "none" is a value of its own.
            if callable(action.type) and not action.choices and action.dest != "report_to":
                action.type = _none_or(action.type)

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
    ) -> tuple[Any, ...]:
        """One object for each dataclass; with return_remaining_strings also the list of what nobody knew.

        Raises:
            ValueError: the YAML file cannot be read, or has keys that no dataclass has (unless
                fail_with_unknown_args=False).
        """
        args = _with_underscores(list(sys.argv[1:] if args is None else args))
        config_file, args = _take_config(args)
        unknown_keys: list[str] = []
        if config_file is not None:
            values = read_config(config_file)
            known = {action.dest for action in self._actions}
            unknown_keys = sorted(set(values) - known)
            if unknown_keys and fail_with_unknown_args:
                raise ValueError(f"{config_file}: unknown keys {unknown_keys}; see --help for the known ones")
            self._use_as_defaults({key: value for key, value in values.items() if key in known})
        *parsed, namespace, remaining = self._parse(args)
        launcher = [flag for flag in remaining if flag.split("=")[0] in _LAUNCHER_FLAGS]
        if launcher:
            raise ValueError(
                f"{launcher[0]}: several processes are started with `accelerate launch -m trl_fast.cli.main ...`; "
                "this command runs one"
            )
        if remaining and fail_with_unknown_args:
            self.error(f"unknown arguments: {' '.join(remaining)}")
        del namespace
        return (*parsed, [*remaining, *unknown_keys]) if return_remaining_strings else tuple(parsed)

    def _parse(self, args: list[str]) -> list[Any]:
        outputs = self.parse_args_into_dataclasses(args=args, return_remaining_strings=True, look_for_args_file=False)
        # HfArgumentParser appends the namespace of what is in no dataclass (--config), then the remaining strings.
        *parsed, remaining = outputs
        extra = [item for item in parsed if not hasattr(item, "__dataclass_fields__")]
        return [*[item for item in parsed if item not in extra], extra, remaining]

    def _use_as_defaults(self, values: dict[str, Any]) -> None:
        for action in self._actions:
            if action.dest in values:
                action.required = False
                action.default = _check_value(action, values[action.dest])


def _none_or(convert: Any) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    parse.__name__ = getattr(convert, "__name__", "value")
    return parse


def _check_value(action: Any, value: Any) -> Any:
    """A YAML value as a default: strings go through the flag's own conversion, choices are held to."""
    if isinstance(value, str) and callable(action.type):
        try:
            value = action.type(value)
        except (ArgumentTypeError, TypeError, ValueError) as error:
            raise ValueError(f"{action.dest}: {value!r} in the YAML file: {error}") from error
    if action.choices and value is not None and value not in action.choices:
        raise ValueError(f"{action.dest}: {value!r} in the YAML file; expected one of {list(action.choices)}")
    return value


def _with_underscores(args: list[str]) -> list[str]:
    def fix(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument.partition("=")
        return name.replace("-", "_").replace("__", "--", 1) + equals + value

    return [fix(argument) for argument in args]


def _take_config(args: list[str]) -> tuple[Path | None, list[str]]:
    for index, argument in enumerate(args):
        if argument == "--config" and index + 1 < len(args):
            return Path(args[index + 1]), args[:index] + args[index + 2 :]
        if argument.startswith("--config="):
            return Path(argument.split("=", 1)[1]), args[:index] + args[index + 1 :]
    return None, args


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; its `env` map is put into the environment and left out.

    Raises:
        ValueError: the file is not there, is no YAML, or is not a map.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected a map of argument names to values, got {type(values).__name__}")
    environment = values.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"--config {path}: env must be a map of names to values, got {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return values
