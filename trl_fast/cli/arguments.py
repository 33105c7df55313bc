"""Defines the arguments that scripts share, of datasets and of the model, its adapter and its quantisation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trl_fast.settings.choices import check_choices, did_you_mean
from trl_fast.settings.field_types import check_types
from trl_fast.settings.older_names import deprecated
from trl_fast.settings.ranges import check_ranges

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class ScriptArguments:
    """Names the dataset that a script works on."""

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

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class DatasetConfig:
    """Describes one dataset of a mixture; all but `columns` and `fraction` are arguments of `datasets.load_dataset`.

    Args:
        path: a hub name, a file or a folder.
        columns: the columns to keep; None keeps all.
        fraction: the dataset's share of the mixture, see `get_dataset`.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """Describes a mixture of datasets; in YAML, `datasets:` is a list of maps with the fields of DatasetConfig.

    Raises:
        ValueError: an entry of `datasets` has a key that DatasetConfig does not have, or no path.
    """

    datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Datasets to put together, a list of maps in the YAML file."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the datasets of the mixture as streams."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share (below 1) or number of the mixture's rows to put into a test split."}
    )

    def __post_init__(self) -> None:
        entries: Any = self.datasets
        if not isinstance(entries, list):
            raise ValueError(
                f"datasets: expected a list of maps such as `- path: x.jsonl`, got {entries!r}; write one"
            )
        self.datasets = [_dataset_config(entry, index) for index, entry in enumerate(entries)]
        check_types(self)
        check_ranges(self)


def _dataset_config(entry: Any, index: int) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        entry = {item.name: getattr(entry, item.name) for item in fields(entry)}
    if not isinstance(entry, dict):
        raise ValueError(f"datasets.{index}: expected a map such as `path: x.jsonl`, got {entry!r}; write one")
    known = [item.name for item in fields(DatasetConfig)]
    for key in entry:
        if key not in known:
            raise ValueError(f"datasets.{index}.{key} is unknown{did_you_mean(str(key), known)}")
    if entry.get("path") is None:
        raise ValueError(f"datasets.{index}: path is missing; give a hub name, a folder or a file")
    if isinstance(entry.get("columns"), str):
        entry = {**entry, "columns": [entry["columns"]]}
    if isinstance(entry.get("columns"), dict):
        raise ValueError(
            f"datasets.{index}.columns: expected a list of columns to keep, got {entry['columns']!r}; columns are not "
            "renamed here, so rename them in the file"
        )
    config = DatasetConfig(**entry)
    try:
        check_types(config)
        check_ranges(config)
    except ValueError as error:
        raise ValueError(f"datasets.{index}.{error}") from error
    return config


@dataclass
class ModelConfig:
    """Names the model to train, and describes its adapter and its quantisation."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str | None = field(default="float32", metadata={"help": "Weights' dtype.", "choices": list(DTYPES)})
    torch_dtype: str | None = field(default=None, metadata={"help": "Older name of dtype.", "choices": list(DTYPES)})
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
    # Scripts for TRL up to 1.6 read it here. Its flag is that of the trainer's config; see below.
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.torch_dtype is not None and self.dtype == "float32" != self.torch_dtype:
            deprecated("ModelConfig", "torch_dtype", "it works; `dtype` is the present name.")
            self.dtype = self.torch_dtype
        # Older scripts read the value under this name.
        self.torch_dtype = self.dtype
        check_types(self)
        check_choices(self, ModelConfig)
        check_ranges(self)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; choose one")
        # peft takes a lone string as a pattern that the whole name must match. TRL hands every lone module over so,
        # and a plain name then matches nothing.
        modules: Any = self.lora_target_modules
        alone = isinstance(modules, list) and len(modules) == 1
        if alone and re.search(r"all-linear|[\\*+?()\[\]|^$]", modules[0]):
            self.lora_target_modules = modules[0]


# The trainer's config has a flag of this name, and two of them are an error. transformers' parser goes by `init`,
# which the constructor above has been made with already, so this field gets none; TrlParser hands the value on.
ModelConfig.__dataclass_fields__["trust_remote_code"].init = False


def get_peft_config(model_args: ModelConfig) -> PeftConfig | None:
    """Returns the LoRA configuration that the arguments describe; None without `use_peft`."""
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
    """Returns the bitsandbytes configuration that the arguments describe; None if nothing is quantised."""
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


def get_kbit_device_map() -> dict[str, int] | None:
    """Returns the device map of a quantised model: the whole model on the GPU of this process; None without a GPU."""
    import torch
    from accelerate import PartialState

    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    return {"": PartialState().local_process_index} if has_gpu else None
