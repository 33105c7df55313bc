"""Loads models by name, puts adapters on models, and finds the parts of a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.utils import is_kernels_available
from transformers.utils.generic import is_flash_attention_requested

from trl_fast.input_errors import error_line
from trl_fast.settings.choices import did_you_mean

from .image_classifiers import register_image_classifier
from .model_changes import changes_of
from .model_folder import shape_mismatch, why_not_loaded

logger = logging.getLogger(__name__)

# What keeps a model from being loaded besides its name and folder: packages and memory.
_NOT_THE_FOLDERS = (ImportError, MemoryError, torch.OutOfMemoryError)
USED_CONVERSIONS = "used conversions"
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_causal_lm(name_or_path: str, **init_kwargs: Any) -> PreTrainedModel:
    """Loads a causal language model by hub name or folder; float32 unless `dtype` says otherwise, as TRL does.

    Where the checkpoint reads images too, so does the model, as in TRL.

    Raises:
        OSError: there is no such model.
        ValueError: dtype is none of auto, bfloat16, float16, float32 or a torch.dtype; or the model's files are broken
            or lack parameters.
    """
    init_kwargs, config = _checked(name_or_path, init_kwargs)
    model, missing = _from_pretrained(language_model_class(config), name_or_path, init_kwargs)
    _check_complete(name_or_path, missing)
    return model


def load_reward_model(name_or_path: str, **init_kwargs: Any) -> PreTrainedModel:
    """Loads a classifier with one label by hub name or folder; of a language model it is one with a new, random head.

    Raises:
        ValueError: num_labels is not 1, the model is a classifier with more labels, or as in `load_causal_lm`.
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
    if reads_images(config):
        register_image_classifier(config)
    model, missing = _from_pretrained(AutoModelForSequenceClassification, name_or_path, init_kwargs)
    # What stands beside the backbone is the head.
    _check_complete(name_or_path, [name for name in missing if name.startswith(f"{model.base_model_prefix}.")])
    return model


def build_without_weights(name_or_path: str, *, classifier: bool = False, **init_kwargs: Any) -> PreTrainedModel:
    """Builds a model on the meta device: its modules and shapes, from its config alone.

    classifier: it gives one number instead of tokens. init_kwargs: `trust_remote_code` and `revision` count.

    Raises:
        OSError, ValueError: there is no config, or transformers has no such model of its type.
    """
    _, config = _checked(name_or_path, dict(init_kwargs))
    config.use_cache = False
    auto: Any = AutoModelForSequenceClassification if classifier else language_model_class(config)
    if classifier:
        config.num_labels = 1
        if reads_images(config):
            register_image_classifier(config)
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=init_kwargs.get("trust_remote_code", False))


def load_tokenizer(name_or_path: str, **init_kwargs: Any) -> Any:
    """Loads a tokenizer, or a processor where the model has one, by hub name or folder.

    Raises:
        OSError: there is none.
        ValueError: it is broken.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **init_kwargs)
    except Exception as error:
        if isinstance(error, _NOT_THE_FOLDERS):
            raise
        reason = why_not_loaded(name_or_path, error)
        raise _kind(error)(f"no tokenizer can be loaded from {name_or_path!r}: {reason}") from error


def load_processor(name_or_path: str, **init_kwargs: Any) -> ProcessorMixin:
    """Loads the processor of a model that reads images, by hub name or folder.

    Raises:
        OSError: there is none.
        ValueError: it is broken, or a package that it needs is missing.
    """
    try:
        processor: Any = AutoProcessor.from_pretrained(name_or_path, **init_kwargs)
    except Exception as error:
        if isinstance(error, _NOT_THE_FOLDERS):
            raise
        reason = why_not_loaded(name_or_path, error)
        raise _kind(error)(f"no processor of images can be loaded from {name_or_path!r}: {reason}") from error
    return processor


def _from_pretrained(
    auto_class: type, name_or_path: str, init_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """Returns a model, and the names of the parameters that its files lack and that are random therefore.

    Raises:
        OSError, ValueError: the model cannot be loaded.
    """
    load: Any = auto_class
    try:
        model, info = load.from_pretrained(name_or_path, output_loading_info=True, **init_kwargs)
    except Exception as error:
        if isinstance(error, _NOT_THE_FOLDERS):
            raise
        reason = why_not_loaded(name_or_path, error)
        if is_deepspeed_zero3_enabled():
            # Only the first process knows, so that the model cannot be loaded once more here.
            reason = shape_mismatch(str(error)) or reason
        elif "ignore_mismatched_sizes" in str(error):
            _, info = load.from_pretrained(
                name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **init_kwargs
            )
            name, found, expected = sorted(info["mismatched_keys"])[0]
            reason = f"{name} has the shape {list(found)} in its files and {list(expected)} by its config.json"
        raise _kind(error)(f"model {name_or_path!r} cannot be loaded: {reason}") from error
    if is_quantized(model):
        return model, []
    return model, sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})


def _kind(error: Exception) -> type[Exception]:
    """Returns the type of the error that takes the place of one of transformers: OSError stays OSError, as in TRL."""
    return OSError if isinstance(error, OSError) else ValueError


def _check_complete(name_or_path: str, missing: list[str]) -> None:
    """Raises ValueError if parameters are missing."""
    if missing:
        raise ValueError(
            f"model {name_or_path!r}: its files lack {len(missing)} parameters, first {missing[0]!r}, which would be "
            "random; give a folder whose weights fit its config.json"
        )


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
    except Exception as error:
        reason = why_not_loaded(name_or_path, error)
        raise _kind(error)(f"model {name_or_path!r} cannot be loaded: {reason}") from error
    return init_kwargs, config


def language_model_class(config: PretrainedConfig) -> Any:
    """Returns the class that makes a language model of a config: for images too where the config describes them."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def reads_images(config: PretrainedConfig) -> bool:
    """Returns whether a model of a config reads images."""
    return getattr(config, "vision_config", None) is not None


def _replace_missing_flash(init_kwargs: dict[str, Any]) -> None:
    """Leaves attn_implementation to transformers where it names flash kernels that this machine has not.

    Rows of several sequences run flash attention of torch's own anyway; see `segment_attention`.
    """
    wanted = init_kwargs.get("attn_implementation")
    if not isinstance(wanted, str) or not is_flash_attention_requested(requested_attention_implementation=wanted):
        return
    version = wanted.removeprefix("flash_attention_")
    package = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(int(version)) if version.isdigit() else None
    installed = package is not None and package["general_availability_check"]()
    serves = torch.cuda.is_available() and (installed or is_kernels_available())
    if not serves:
        del init_kwargs["attn_implementation"]
        logger.warning(
            f"attn_implementation={wanted!r} cannot be had here: rows of several sequences run torch's own flash "
            "attention, padded ones transformers' default."
        )


def keep_used_conversions(model: PreTrainedModel) -> None:
    """Has a model saved under the names that it was loaded from: under ZeRO-3 transformers changes others too.

    Of the changes of names and shapes that a family's files may need it undoes all, also those that were not made:
    Qwen3.5 would get names that cannot be loaded.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    used = [each for each in conversions if each.was_used()]
    if len(used) < len(conversions):
        change = changes_of(model).get_or_add(USED_CONVERSIONS, "weights are saved under the names of their files")
        change.set(model, "_weight_conversions", used)


def is_quantized(model: torch.nn.Module) -> bool:
    """Returns whether bitsandbytes holds the weights in 4 or 8 bits."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the transformers model: the one inside, where adapters were put on."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def reads_more_than_text(model: PreTrainedModel) -> bool:
    """Returns whether a model is of a class for images or sound too, with a text model inside."""
    return model.config.get_text_config() is not model.config


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its head; of a model that reads images or sound too, its text model.

    For text these are the same: the class around it only puts the embeddings of images in their places. Its text model
    takes positions (B, T) where the class has three numbers a token (M-RoPE), all equal for text.
    """
    if reads_more_than_text(model):
        text: Any = model.get_decoder()
        return text if text.get_output_embeddings() is None else backbone(text)
    return whole_backbone(model)


def whole_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its head; of a model that reads images or sound too, with all that reads those."""
    # Llama 4's prefix names no module of it; base_model is then the model itself.
    inner: Any = model.model if model.base_model is model else model.base_model
    return inner


@contextmanager
def without_peft_deprecations() -> Iterator[None]:
    """Hides the warning that peft asks transformers by a deprecated name: no user can do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Puts a fresh adapter on a model.

    Raises:
        TypeError: peft_config is no PeftConfig.
        ValueError: the model has an adapter already, or peft does not take the config for it.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config: expected a peft.PeftConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config: the model is a PeftModel already; merge its adapter first (model.merge_and_unload()), or "
            "leave peft_config out to train the adapter that it has"
        )
    _check_modules_to_save(model, peft_config)
    try:
        with without_peft_deprecations():
            return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(f"peft_config: {_with_remedy(error_line(error), model)}") from error


def _with_remedy(text: str, model: PreTrainedModel) -> str:
    """Returns what peft says of a config, with what to do where peft does not know."""
    if "incompatible with Mamba" in text:
        return (
            f"{text.rstrip('.')}: name other modules, or add exclude_modules=['out_proj', 'conv1d'] (in commands "
            "--lora_exclude_modules out_proj conv1d)"
        )
    if "specify `target_modules`" in text:
        return (
            f"peft knows no target_modules of {model.config.model_type} by itself; name some, such as 'q_proj' and "
            "'v_proj', or 'all-linear' for every linear layer (in commands --lora_target_modules)"
        )
    return text


def _check_modules_to_save(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Raises ValueError if a module that is to be trained whole is none of the model's: peft would say nothing."""
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()} | {
        name for name, _ in model.named_modules()
    }
    # peft itself writes both into the config of a classifier, which may be used again.
    written = {"classifier", "score"} if peft_config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else set()
    for name in getattr(peft_config, "modules_to_save", None) or ():
        if name not in written and not any(each == name or each.endswith(f".{name}") for each in known):
            raise ValueError(
                f"peft_config: modules_to_save names {name!r}, which {type(model).__name__} does not have"
                f"{did_you_mean(name, known)}"
            )


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
