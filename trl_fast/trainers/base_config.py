"""What the configs of all trainers share."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from trl_fast.ops.linear_logprob import HEAD_GRADS

logger = logging.getLogger(__name__)

BATCH_LAYOUTS = ("auto", "packed", "padded")


def machine_has_bf16() -> bool:
    """Whether bfloat16 products run on hardware here: on a GPU that has them, or on a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def deprecated(owner: str, name: str, what: str) -> None:
    """One line about a name of an older TRL."""
    warnings.warn(f"{owner}: `{name}` is a name of an older TRL; {what}", FutureWarning, stacklevel=4)


@dataclass
class BaseConfig(TrainingArguments):
    """`transformers.TrainingArguments` with TRL's defaults, and the settings of our own that all trainers share.

    Defaults that differ from transformers: logging_steps 10, gradient_checkpointing True, and bf16 True unless fp16 is
    set or the machine has no bfloat16 hardware (TRL then stops; we say so and train in float32).
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many update steps; below 1, that share of all steps."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in backward: less memory, about a fifth slower."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision. Unset: on, unless fp16 is set or the machine cannot do it."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords of from_pretrained, used when the model is given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that bring Python code of their own."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off in the model and reference."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare the dataset; unset: this one."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt + completion in tokens; longer ones are cut. None: no limit."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad rows of the padded layout to a multiple of this; auto: do not."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture of experts' load-balancing loss. Unset: what the model's config says."},
    )
    activation_offloading: bool = field(default=False, metadata={"help": "Not supported yet."})
    batch_layout: str = field(
        default="auto",
        metadata={
            "help": "packed: one row without padding; padded: a row a sequence; auto: packed where the model allows.",
            "choices": list(BATCH_LAYOUTS),
        },
    )
    head_backend: str | None = field(
        default=None,
        metadata={"help": "Force the head's backend: cuda, triton, cpp or torch. Unset: the best one here."},
    )
    head_workspace_bytes: int | None = field(
        default=None, metadata={"help": "Limit of the memory that grows with tokens times vocabulary; default 1 GiB."}
    )
    head_grad: str = field(
        default="exact",
        metadata={
            "help": "sparse: an unbiased estimate of the head's gradient, without its two backward products.",
            "choices": list(HEAD_GRADS),
        },
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Deprecated: set it on the tokenizer and pass that as processing_class."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and machine_has_bf16()
            if not (self.bf16 or self.fp16):
                logger.warning("This machine has no bfloat16 hardware: training in float32 (bf16=False).")
        super().__post_init__()
        self._check_choice("batch_layout", BATCH_LAYOUTS)
        self._check_choice("head_grad", HEAD_GRADS)
        if self.activation_offloading:
            raise NotImplementedError("activation_offloading=True is not supported yet; set it to False")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be a positive number of tokens or None, got {self.max_length}")
        if self.pad_token is not None:
            deprecated(type(self).__name__, "pad_token", "set tokenizer.pad_token and pass processing_class instead.")
        self.pad_to_multiple_of = self._multiple(self.pad_to_multiple_of)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(choices)}")

    @staticmethod
    def _multiple(value: int | str | None) -> int | None:
        # The command line gives a string.
        if value is None or str(value).lower() in ("auto", "none", "null"):
            return None
        return int(value)

    @classmethod
    def from_any(cls, args: object) -> BaseConfig:
        """This class's config from another object of the same meaning (TRL's own), field by field.

        Raises:
            TypeError: `args` is not a TrainingArguments.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"args: expected a {cls.__name__}, got {type(args).__name__}")
        known = {item.name for item in fields(cls) if item.init}
        values = {item.name: getattr(args, item.name) for item in fields(args) if item.init and item.name in known}
        return cls(**values)
