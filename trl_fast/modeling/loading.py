"""Loads models by name, puts adapters on models, and finds the parts of a model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.utils import is_kernels_available
from transformers.utils.generic import is_flash_attention_requested

from .model_changes import changes_of

logger = logging.getLogger(__name__)

_DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_causal_lm(name_or_path: str, **init_kwargs: Any) -> PreTrainedModel:
    """Loads a causal language model by hub name or folder; float32 unless `dtype` says otherwise, as TRL does.

    Raises:
        ValueError: dtype is none of auto, bfloat16, float16, float32 or a torch.dtype.
        OSError: there is no such model.
    """
    init_kwargs, _ = _checked(name_or_path, init_kwargs)
    return AutoModelForCausalLM.from_pretrained(name_or_path, **init_kwargs)


def load_reward_model(name_or_path: str, **init_kwargs: Any) -> PreTrainedModel:
    """Loads a classifier with one label by hub name or folder; of a language model it is one with a new, random head.

    Raises:
        ValueError: num_labels is not 1, the model is a classifier with more labels, or as in `load_causal_lm`.
        OSError: there is no such model.
    """
    if init_kwargs.setdefault("num_labels", 1) != 1:
        raise ValueError(
            f"model_init_kwargs: num_labels={init_kwargs['num_labels']}, but a reward is one number; leave it out"
        )
    init_kwargs, config = _checked(name_or_path, init_kwargs)
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ValueError(
            f"model {name_or_path!r} is a classifier with num_labels={config.num_labels}, but a reward is one number; "
            "start from a model with num_labels=1, or from a language model"
        )
    return AutoModelForSequenceClassification.from_pretrained(name_or_path, **init_kwargs)


def _checked(name_or_path: str, init_kwargs: dict[str, Any]) -> tuple[dict[str, Any], PretrainedConfig]:
    """Returns the keywords of from_pretrained with our defaults filled in, and the model's config."""
    dtype = init_kwargs.get("dtype", "float32")
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {_DTYPES} or a torch.dtype, got {dtype!r}")
    init_kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    _replace_missing_flash(init_kwargs)
    if "device_map" not in init_kwargs:
        init_kwargs["device_map"] = "auto" if torch.cuda.is_available() else None
    try:
        config = AutoConfig.from_pretrained(
            name_or_path,
            trust_remote_code=init_kwargs.get("trust_remote_code", False),
            revision=init_kwargs.get("revision") or "main",
        )
    except OSError as error:
        raise OSError(f"model {name_or_path!r} is no folder here and cannot be had from the hub: {error}") from error
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(f"model {name_or_path!r} is a vision-language model; only text models are supported so far")
    return init_kwargs, config


def _replace_missing_flash(init_kwargs: dict[str, Any]) -> None:
    """Leaves attn_implementation to transformers where it names flash kernels that this machine has not.

    Rows of several sequences run flash attention of torch's own anyway; see `segment_attention`.
    """
    wanted = init_kwargs.get("attn_implementation")
    if not isinstance(wanted, str) or not is_flash_attention_requested(requested_attention_implementation=wanted):
        return
    installed = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(int(wanted[-1]) if wanted[-1].isdigit() else 0)
    named = wanted.startswith("flash_attention_") and installed is not None
    serves = torch.cuda.is_available() and (
        is_kernels_available() or (named and installed["general_availability_check"]())
    )
    if not serves:
        del init_kwargs["attn_implementation"]
        logger.warning(
            f"attn_implementation={wanted!r} cannot be had here: rows of several sequences run torch's own flash "
            "attention, padded ones transformers' default."
        )


def is_quantized(model: torch.nn.Module) -> bool:
    """Returns whether bitsandbytes holds the weights in 4 or 8 bits."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the transformers model: the one inside, where adapters were put on."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its head."""
    # Llama 4's prefix names no module of it; base_model is then the model itself.
    inner: Any = model.model if model.base_model is model else model.base_model
    return inner


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Puts a fresh adapter on a model. On a quantised one its weights become bfloat16 (QLoRA, arXiv 2305.14314).

    Raises:
        TypeError: peft_config is no PeftConfig.
        ValueError: the model has an adapter already.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config: expected a peft.PeftConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config: the model is a PeftModel already; merge its adapter first (model.merge_and_unload()), or "
            "leave peft_config out to train the adapter that it has"
        )
    adapted = get_peft_model(model, peft_config)
    if is_quantized(model):
        for name, parameter in adapted.named_parameters():
            # DoRA's magnitudes take steps too small for bfloat16.
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout's probability to zero, also those that a module keeps as a number for its attention function.

    TRL leaves the latter on.
    """
    found = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if _is_dropout(module, name) and isinstance(value, int | float) and value != 0.0
    ]
    if found:
        change = changes_of(model).get_or_add("dropout", "is switched off in every module")
        for module, name in found:
            change.set(module, name, 0.0)


def _is_dropout(module: torch.nn.Module, name: str) -> bool:
    """Returns whether an attribute of a module is a dropout's probability."""
    return (isinstance(module, torch.nn.Dropout) and name == "p") or "dropout" in name or "pdrop" in name
