"""Defines the config that those of all trainers extend."""

from __future__ import annotations

import inspect
import logging
import os
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from transformers.training_args import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from trl_fast.settings.batch_layouts import LAYOUT_CHOICES
from trl_fast.settings.choices import BALANCES, check_choices, did_you_mean, one_of
from trl_fast.settings.older_names import OlderName, deprecated, older_name
from trl_fast.settings.ranges import check_ranges

logger = logging.getLogger(__name__)

# Fields of TRL's configs that have another default here, in some method.
OTHER_DEFAULTS = frozenset({"logging_nan_inf_filter", "loss_type", "shuffle_dataset", "use_bias_correction_kl"})
# tiled_mlp=True: enough tokens for a GPU's matrix products to be at full speed.
DEFAULT_TILE_TOKENS = 4096


def machine_has_bf16() -> bool:
    """Says whether the hardware here has bfloat16 products: a GPU that has them, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def activation_budget(activation_budget_bytes: int | None, activation_offloading: bool) -> int | None:
    """Returns the bytes that a forward pass may keep beyond what gradient checkpointing keeps; None: by device.

    Who lets activations wait in the CPU's memory wants none on the GPU, unless a budget is given.
    """
    return 0 if activation_budget_bytes is None and activation_offloading else activation_budget_bytes


def _default(item: Field) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _is_same(value: object, default: object) -> bool:
    """Says whether a setting is its default; nothing is nothing, as None, an empty text, list or map."""
    nothing: tuple[object, ...] = (None, "", [], {})
    return value == default or (value in nothing and default in nothing)


def _number(value: float | str) -> float | str:
    """Returns the number that the command line gives as text; other values as they are."""
    for read in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return read(value)
    return value


@dataclass
class BaseConfig(TrainingArguments):
    """Extends `transformers.TrainingArguments` by TRL's defaults and the settings that all trainers share.

    Defaults that differ from transformers: logging_steps 10, gradient_checkpointing True, and bf16 True unless fp16 is
    set or the machine has no bfloat16 hardware (TRL then stops; we say so and train in float32). One differs from
    TRL's too: logging_nan_inf_filter False, so that a loss of NaN is shown as NaN and not as 0.

    Raises:
        ValueError: a number is NaN, infinite or out of the range that `trl_fast.settings.ranges` has for it.
    """

    # What a row of a batch is, and the metrics that tell most about a run.
    unit: ClassVar[str] = "rows"
    first_metrics: ClassVar[tuple[str, ...]] = ("loss",)

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]
    # Names that are gone from transformers or TRL and cannot be taken over, with what to do instead.
    _GONE = {
        "group_by_length": "set train_sampling_strategy='group_by_length'",
        "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
        "half_precision_backend": "leave it out",
        "fp16_backend": "leave it out",
        "torchdynamo": "set torch_compile=True",
        "per_gpu_train_batch_size": "set per_device_train_batch_size",
        "per_gpu_eval_batch_size": "set per_device_eval_batch_size",
    }

    logging_steps: float = 10
    """Log every so many update steps; below 1, that share of all steps."""

    gradient_checkpointing: bool = True
    """Recompute activations in backward: less memory, about a fifth slower."""

    logging_nan_inf_filter: bool = False
    """Leave losses that are NaN or infinite out of the logged mean."""

    bf16: bool | None = None
    """bfloat16 mixed precision. None: on, unless fp16 is set or the machine has no bfloat16 hardware."""

    model_init_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of from_pretrained, used when the model is given by name. None: none."""

    trust_remote_code: bool = False
    """Allow models and tokenizers that bring Python code of their own."""

    disable_dropout: bool = True
    """Switch dropout off in the model and the reference."""

    dataset_num_proc: int | None = None
    """Processes that prepare the dataset. None: this one."""

    max_length: int | None = 1024
    """Longest prompt + completion in tokens; longer ones are cut. None: no limit."""

    pad_to_multiple_of: int | str | None = "auto"
    """Pad rows of the padded layout to a multiple of this number of tokens. auto, None: do not."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts. None: what the model's config says; 0: off."""

    activation_budget_bytes: int | None = None
    """Bytes for activations that gradient checkpointing need not compute again, a model and forward pass.

    On a GPU whole layers are kept, else results of matrix products and attention. None: what is free on a GPU, on a
    CPU 384 KiB a token and at most 1 GiB, none with activation_offloading. 0: none.
    """

    activation_offloading: bool = False
    """Keep what backward needs in CPU memory meanwhile: longer rows fit a GPU, but it is slower."""

    tiled_mlp: int | str | None = None
    """Compute MLPs in tiles of so many tokens, forward and backward: less memory for long rows.

    It costs one more forward pass of the MLPs. True: 4096 tokens. None: whole rows.
    """

    fused_layers: Literal["auto", True, False] = "auto"
    """Run what a model's layers compute row by row in one pass each, with less kept for backward.

    Norms, gated MLPs, rotary embeddings and more, where their code is known and kernels are here. auto: what can be;
    True: an error where nothing can be; False: nothing.
    """

    batch_layout: str = one_of(LAYOUT_CHOICES, default="auto")
    """How a batch is laid out: auto, shared_prefix, packed or padded.

    shared_prefix: one row without padding, each prompt once; packed: one row without padding; padded: a row a
    sequence; auto: the first of these that the model allows.
    """

    balance_batches: str | None = one_of(BALANCES, default=None)
    """How rows are dealt to several processes by their cost: never, micro_batch or step.

    micro_batch: those that all processes compute at the same time; step: those of an optimizer step, so that with
    gradient_accumulation_steps rows of like cost are computed at the same time. The rows and the loss of a step stay
    the same. None: micro_batch, if every logged number stays the same.
    """

    head_backend: str | None = one_of("trl_fast.ops.backends:BACKENDS", default=None)
    """Force the backend of the language-model head: cuda, triton, cpp or torch. None: the best one here."""

    head_workspace_bytes: int | None = None
    """Limit in bytes of the memory that grows with tokens times vocabulary. None: by the batch, as TRL has there."""

    head_grad: str = one_of("trl_fast.ops.head.plan:HEAD_GRADS", default="exact")
    """Gradient of the language-model head: exact or sparse.

    sparse: an unbiased estimate of it, without its two backward products.
    """

    resume_from_checkpoint: str | None = None
    """Checkpoint that a command goes on from: a folder, or true for the newest in output_dir. None: begin anew."""

    run_report: bool = True
    """Say what runs and what it cost, and write run.json and report.html into output_dir."""

    pad_token: str | None = older_name("it works; set tokenizer.pad_token and pass processing_class instead.")
    # Names of older transformers, which scripts for older TRL versions bring along.
    evaluation_strategy: str | None = older_name(now="eval_strategy")
    no_cuda: bool | None = older_name(now="use_cpu")
    warmup_ratio: float | None = older_name(
        "it works; `warmup_steps` below 1 is the present way to give a share of all steps.", now="warmup_steps"
    )
    overwrite_output_dir: bool | None = older_name("it has no effect; the output folder is always written to.")
    save_safetensors: bool | None = older_name("it has no effect; weights are always saved as safetensors.")

    def __new__(cls, *args: Any, **kwargs: Any) -> BaseConfig:
        known = inspect.signature(cls.__init__).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        for name in () if takes_any else kwargs.keys() - known.keys():
            advice = f"; {cls._GONE[name]}" if name in cls._GONE else did_you_mean(name, known)
            raise TypeError(f"{cls.__name__} has no field {name!r}{advice}")
        config = super().__new__(cls)
        positional = [item.name for item in fields(cls) if item.init]
        config._given = {**dict(zip(positional, args, strict=False)), **kwargs}
        return config

    def changed_settings(self) -> dict[str, Any]:
        """Returns the settings that were given and differ from their defaults, as they are now."""
        defaults = {item.name: _default(item) for item in fields(self) if item.init}
        given = {name: value for name, value in self._given.items() if name in defaults}
        changed = {name: getattr(self, name) for name, value in given.items() if value != defaults[name]}
        # The command line gives every setting, some of them as other words for the default.
        return {name: value for name, value in changed.items() if not _is_same(value, defaults[name])}

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings for JSON, as the base does, which hides the hub's token.

        It takes `eos_token` for such a secret too, so that a config could not be read back.
        """
        secrets = ("hub_token", "push_to_hub_token")
        shown = (item.name for item in fields(self) if item.name.endswith("_token") and item.name not in secrets)
        return super().to_dict() | {name: getattr(self, name) for name in shown}

    def __post_init__(self) -> None:
        self.pad_to_multiple_of = self._multiple(self.pad_to_multiple_of)
        self.tiled_mlp = self._tile_tokens(self.tiled_mlp)
        self.fused_layers = self._auto_or_truth(self.fused_layers)
        # Imported here, for importing a config is to load few modules.
        from trl_fast.settings.field_types import check_maps, check_types

        check_types(self)
        check_maps(self, self._VALID_DICT_FIELDS)
        check_choices(self, BaseConfig)
        check_ranges(self)
        if self.deepspeed:
            from trl_fast.settings.packages import check_package

            check_package("deepspeed", "deepspeed", f"deepspeed={self.deepspeed!r}")
        self._accept_older_names()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and machine_has_bf16()
            if not (self.bf16 or self.fp16):
                logger.warning("This machine has no bfloat16 hardware: training in float32 (bf16=False).")
            # Without a GPU, transformers takes bfloat16 only where a CPU is asked for.
            self.use_cpu = self.use_cpu or (self.bf16 and not is_torch_bf16_gpu_available())
        # Processes on CPUs find each other only where a CPU is asked for; else each of them would train alone.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.use_cpu = self.use_cpu or (several and not torch.accelerator.is_available())
        for name in ("checkpointing", "checkpointing_kwargs"):
            # The newer name of the same: transformers would warn of the older one, which has a default here.
            if getattr(self, f"activation_{name}", self) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        super().__post_init__()
        # Again: what came as JSON is numbers now.
        check_ranges(self)
        self._check_checkpointing()
        if self.use_liger_kernel:
            if self.fused_layers is True:
                raise ValueError("fused_layers=True: use_liger_kernel=True fuses the same layers; leave one out")
            self._keep_head_from_liger()

    def _check_checkpointing(self) -> None:
        budget, keywords = self.activation_budget_bytes, self.gradient_checkpointing_kwargs or {}
        asked = "gradient_checkpointing_kwargs={'selective': True}" if keywords.get("selective") else None
        if asked is None and budget:
            asked = f"activation_budget_bytes={budget}"
        if asked and not self.gradient_checkpointing:
            raise ValueError(f"{asked} is of use with gradient_checkpointing=True only; set it, or leave this out")
        if asked and keywords.get("use_reentrant"):
            raise ValueError(f"{asked} needs use_reentrant=False in gradient_checkpointing_kwargs")

    @property
    def activation_budget(self) -> int | None:
        """Returns the bytes that a forward pass may keep beyond what gradient checkpointing does; None: by device."""
        return activation_budget(self.activation_budget_bytes, self.activation_offloading)

    @property
    def keeps_attention(self) -> bool:
        """Says whether gradient checkpointing keeps all results of attention: TRL's `selective`."""
        return bool((self.gradient_checkpointing_kwargs or {}).get("selective"))

    def _keep_head_from_liger(self) -> None:
        """Switches Liger's fused head off, which would take the place of ours; its kernels for layers may be used."""
        chosen = self.liger_kernel_config or {}
        for name in ("fused_linear_cross_entropy", "cross_entropy"):
            if chosen.get(name):
                raise ValueError(
                    f"liger_kernel_config={{{name!r}: True}} replaces the head and its loss, which are fused already; "
                    "leave it out"
                )
        self.liger_kernel_config = {**chosen, "fused_linear_cross_entropy": False}

    def _accept_older_names(self) -> None:
        by_name = {item.name: item for item in fields(self)}
        for name, item in by_name.items():
            older = item.metadata.get("help")
            if not isinstance(older, OlderName) or getattr(self, name) is None:
                continue
            deprecated(type(self).__name__, name, older.what)
            now = older.now
            if now is not None:
                if getattr(self, now) == _default(by_name[now]):
                    setattr(self, now, getattr(self, name))
                setattr(self, name, None)

    def with_older_arguments(self, trainer_class: type, older: dict[str, Any]) -> BaseConfig:
        """Returns this config with the fields that older scripts give to the trainer; each is warned of in one line.

        Raises:
            TypeError: a name is no field.
        """
        known = {item.name: item for item in fields(self) if item.init}
        for name in older:
            if name not in known:
                others = inspect.signature(trainer_class.__init__).parameters
                hint = did_you_mean(name, [*known, *others])
                raise TypeError(f"{trainer_class.__name__} has no argument {name!r}{hint}")
            # A field that is itself an older name has its own line.
            if not isinstance(known[name].metadata.get("help"), OlderName):
                what = f"it works; {type(self).__name__}({name}=...) is its present place."
                deprecated(trainer_class.__name__, name, what)
        return replace(self, **older) if older else self

    @staticmethod
    def _multiple(value: int | str | None) -> float | str | None:
        return None if str(value).lower() in ("auto", "none", "null") else _number(value)

    @staticmethod
    def _tile_tokens(value: int | str | None) -> float | str | None:
        text = str(value).lower()
        if text in ("none", "null", "false"):
            return None
        return DEFAULT_TILE_TOKENS if text == "true" else _number(value)

    @staticmethod
    def _auto_or_truth(value: object) -> Literal["auto", True, False]:
        found = {"auto": "auto", "true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
        if found is None:
            raise ValueError(f"fused_layers={value!r} is unknown; expected one of auto, True, False")
        return cast('Literal["auto", True, False]', found)

    @classmethod
    def from_any(cls, args: object) -> BaseConfig:
        """Makes a config of this class from another of the same meaning (TRL's own), field by field.

        Raises:
            TypeError: `args` is not a TrainingArguments.
            ValueError: it sets a field that this class does not have.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"args: expected a {cls.__name__}, got {type(args).__name__}")
        given = {item.name: (getattr(args, item.name), _default(item)) for item in fields(args) if item.init}
        known = {item.name: item for item in fields(cls) if item.init}
        lost = [name for name, (value, default) in given.items() if name not in known and value != default]
        if lost:
            shown = ", ".join(f"{name}={given[name][0]!r}" for name in lost)
            raise ValueError(
                f"args: {cls.__name__} does not have what this {type(args).__name__} sets: {shown}; leave it at its "
                f"default, or give a trl_fast.{cls.__name__}"
            )
        kind = type(args)
        ours = issubclass(kind, BaseConfig) and not issubclass(cls, kind)
        if ours or (kind.__module__.startswith("trl.") and kind.__name__ != cls.__name__):
            raise TypeError(f"args: expected a {cls.__name__}, got {kind.__name__}, which is another trainer's")
        # What is an older name to us, or has another default here, and is at its default there was not set by anyone.
        differs = {name for name, item in known.items() if isinstance(item.metadata.get("help"), OlderName)}
        differs |= OTHER_DEFAULTS
        unset = {name for name, (value, default) in given.items() if name in differs and value == default}
        return cls(**{name: value for name, (value, _) in given.items() if name in known and name not in unset})
