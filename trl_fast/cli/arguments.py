"""Defines the arguments that scripts share, of datasets and of the model, its adapter and its quantisation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trl_fast.settings.choices import check_choices, did_you_mean, one_of
from trl_fast.settings.field_types import check_types
from trl_fast.settings.older_names import deprecated
from trl_fast.settings.ranges import check_ranges

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class ScriptArguments:
    """Names the dataset that a script works on: `dataset_name`, and its splits."""

    dataset_name: str | None = None
    """Dataset to work on: a hub name, a folder, or a JSON, JSONL, CSV or Parquet file."""

    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset. None: the dataset's default."""

    dataset_train_split: str = "train"
    """Split to train on; slices such as train[:90%] work."""

    dataset_test_split: str = "test"
    """Split to evaluate on; slices such as train[90%:] work."""

    dataset_streaming: bool = False
    """Read the dataset as a stream, row by row, instead of loading the whole of it; training then needs max_steps."""

    ignore_bias_buffers: bool = False
    """Do not synchronise boolean buffers between processes (DDP), for models where that fails."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class DatasetConfig:
    """Describes one dataset of a mixture.

    All fields but `columns` and `fraction` are arguments of `datasets.load_dataset`.
    """

    path: str
    """Hub name, folder or file."""

    name: str | None = None
    """Configuration (subset) of a hub dataset. None: the dataset's default."""

    data_dir: str | None = None
    """Folder of the data files, below `path`. None: the whole of it."""

    data_files: str | list[str] | dict[str, str] | None = None
    """Files to read: a name, several, or a map from splits to names. None: all."""

    split: str = "train"
    """Split to read; slices such as train[:90%] work."""

    columns: list[str] | None = None
    """Columns to keep. None: all."""

    fraction: float | None = None
    """The dataset's share of the mixture, see `get_dataset`. None: all of its rows."""


@dataclass
class DatasetMixtureConfig:
    """Describes a mixture of datasets; in YAML, `datasets:` is a list of maps with the fields of DatasetConfig.

    Raises:
        ValueError: an entry of `datasets` has a key that DatasetConfig does not have, or no path.
    """

    datasets: list[DatasetConfig] = field(default_factory=list)
    """Datasets to put together: in the YAML file a list of maps with the fields of DatasetConfig."""

    streaming: bool = False
    """Read the datasets of the mixture as streams."""

    test_split_size: float | None = None
    """Rows of the mixture to put into a test split: a number, or a share if below 1. None: no test split."""

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
    """Names the model to train, and describes its adapter and its quantisation.

    Set first: `model_name_or_path`; `dtype` (float32 by default, as in TRL); `use_peft` to train a LoRA adapter, and
    `load_in_4bit` with it (QLoRA).
    """

    model_name_or_path: str | None = None
    """Model to start from: a hub name or a folder."""

    model_revision: str = "main"
    """Branch, tag or commit of a hub model."""

    dtype: str | None = one_of(DTYPES, default="float32")
    """Number format of the loaded weights: auto (as they are saved), bfloat16, float16 or float32."""

    torch_dtype: str | None = one_of(DTYPES, default=None)
    """Older name of `dtype`."""

    attn_implementation: str | None = None
    """Attention implementation of transformers, such as sdpa or flash_attention_2. None: the model's default."""

    use_peft: bool = False
    """Train a LoRA adapter instead of the whole model."""

    lora_r: int = 16
    """Rank of the LoRA matrices."""

    lora_alpha: int = 32
    """Scale of the adapter: its output is multiplied by lora_alpha / lora_r."""

    lora_dropout: float = 0.05
    """Dropout probability of the adapter's input."""

    lora_target_modules: list[str] | None = None
    """Modules that get an adapter, such as q_proj v_proj, or all-linear. None: PEFT's choice for the model."""

    lora_target_parameters: list[str] | None = None
    """Parameters that get an adapter though they are no modules, as in mixtures of experts. None: none."""

    lora_modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter, such as embed_tokens. None: none."""

    lora_task_type: str = "CAUSAL_LM"
    """PEFT's task type: CAUSAL_LM; SEQ_CLS for reward models."""

    use_rslora: bool = False
    """Rank-stabilised LoRA: scale by lora_alpha / √lora_r instead of lora_alpha / lora_r."""

    use_dora: bool = False
    """DoRA: split each weight into magnitude and direction, and adapt the direction (arXiv 2402.09353)."""

    load_in_8bit: bool = False
    """Load the weights in 8 bits (bitsandbytes); train an adapter with it: use_peft."""

    load_in_4bit: bool = False
    """Load the weights in 4 bits (bitsandbytes, QLoRA); train an adapter with it: use_peft."""

    bnb_4bit_quant_type: str = one_of(("fp4", "nf4"), default="nf4")
    """Format of 4-bit weights: fp4 or nf4."""

    use_bnb_nested_quant: bool = False
    """Quantise the scales of 4-bit weights too (double quantisation)."""

    bnb_4bit_quant_storage: str | None = None
    """Number format in which 4-bit weights are stored, such as bfloat16 for FSDP. None: uint8."""

    # TRL has no such argument; it stands behind those that TRL takes by their places.
    lora_exclude_modules: list[str] | None = None
    """Modules that get no adapter though lora_target_modules names them, as out_proj conv1d of Mamba. None: none."""

    # Scripts for TRL up to 1.6 read it here. Its flag is that of the trainer's config; see below.
    trust_remote_code: bool = False
    """Allow models and tokenizers that bring Python code of their own."""

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
        exclude_modules=model_args.lora_exclude_modules,
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
