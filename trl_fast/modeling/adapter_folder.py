"""Loads a model or an adapter from a folder or by hub name, for using it rather than for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, TaskType
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from trl_fast.input_errors import error_line
from trl_fast.settings.packages import check_package

from .chat_template import set_eos_token
from .finite_weights import check_weights
from .loading import (
    base_model,
    is_quantized,
    load_causal_lm,
    load_processor,
    load_reward_model,
    load_tokenizer,
    without_peft_deprecations,
)
from .model_folder import why_not_loaded

_TASKS = (TaskType.CAUSAL_LM, TaskType.SEQ_CLS, None)


def is_adapter(name_or_path: str, revision: str | None = None) -> bool:
    """Says whether a folder or hub name is that of an adapter."""
    if Path(name_or_path).is_dir():
        return (Path(name_or_path) / ADAPTER_CONFIG_NAME).is_file()
    try:
        return find_adapter_config_file(name_or_path, revision=revision) is not None
    except (OSError, ValueError, HFValidationError):
        # What it is instead, loading it will tell.
        return False


def why_no_adapter(name_or_path: str) -> str:
    """Returns why there is no adapter in a folder or under a hub name, with what to give instead."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return "there is no such folder, and no such adapter on the hub"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG_NAME}"))
    last = get_last_checkpoint(str(folder))
    if last is not None and Path(last).name in inside:
        return f"it has no {ADAPTER_CONFIG_NAME}; its newest checkpoint is {last}, give that"
    if inside:
        several = "several adapters" if len(inside) > 1 else "an adapter in a folder of its own"
        return f"it has {several}: give one of {', '.join(str(folder / name) for name in inside)}"
    if (folder / "config.json").is_file():
        return f"it has no {ADAPTER_CONFIG_NAME}: it is a whole model already"
    return f"it has no {ADAPTER_CONFIG_NAME}; give the folder that training wrote"


def read_adapter(name_or_path: str, revision: str | None = None) -> PeftConfig:
    """Returns an adapter's configuration.

    Raises:
        ValueError: there is no adapter, it cannot be read, or it is of a task that is not trained here.
    """
    if not is_adapter(name_or_path, revision):
        raise ValueError(f"{name_or_path!r} is no adapter: {why_no_adapter(name_or_path)}")
    try:
        config = PeftConfig.from_pretrained(name_or_path, revision=revision)
    except Exception as error:
        raise ValueError(f"{name_or_path!r}: its {ADAPTER_CONFIG_NAME} cannot be read: {error_line(error)}") from error
    if config.task_type not in _TASKS:
        raise ValueError(f"{name_or_path!r} is an adapter for {config.task_type}; expected a language or reward model")
    return config


def load_with_adapter(
    name_or_path: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    for_merging: bool = True,
    quantization_config: object | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Loads an adapter on its base model, in eval mode, and the tokenizer that it was trained with.

    Args:
        base: name or folder of the base model; None: the one that the adapter names.
        dtype: of the base model's weights; auto: as they are stored.
        device_map: as in from_pretrained; None: the CPU.
        for_merging: whether weights of 4 and 8 bits are dequantized, and other quantized ones refused.
        quantization_config: of bitsandbytes; how the base is quantized while it is loaded. None: it is not.

    Raises:
        ValueError, OSError: as in `read_adapter`; or the base cannot be loaded, its files are quantized in a way that
            nothing can be merged into, or the adapter does not fit it or holds NaN.
    """
    config = read_adapter(name_or_path, revision)
    name = base or config.base_model_name_or_path
    if name is None:
        raise ValueError(f"{name_or_path!r} does not name its base model; give base_model")
    load = load_reward_model if config.task_type == TaskType.SEQ_CLS else load_causal_lm
    options = {"trust_remote_code": trust_remote_code}
    given = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        if for_merging:
            check_dequantizable(name, quantization_config is not None, **options)
        model = load(name, dtype=dtype, device_map=device_map, **given, **options)
        if for_merging and is_quantized(model):
            model = dequantized_model(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"the base model of {name_or_path!r}: {error_line(error)}; see base_model") from error
    tokenizer = tokenizer_of(name_or_path, name, **options)
    fit_to_tokenizer(model, tokenizer)
    try:
        with without_peft_deprecations():
            adapted = PeftModel.from_pretrained(model, name_or_path, revision=revision)
    except Exception as error:
        raise ValueError(
            f"{name_or_path!r} does not fit its base model {name!r}: {error_line(error)}; give the one that it was "
            "trained on as base_model"
        ) from error
    check_weights(adapted, name_or_path)
    return adapted.eval(), tokenizer


def check_dequantizable(name_or_path: str, quantizes: bool, **options: Any) -> None:
    """Checks that nothing but weights of bitsandbytes has to be dequantized.

    quantizes: whether the model is to be quantized when it is loaded.

    Raises:
        ImportError: its files hold weights of bitsandbytes, which is not installed.
        ValueError: they are quantized in another way, or already; or its configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, **options)
    except Exception as error:
        raise ValueError(f"model {name_or_path!r} cannot be loaded: {why_not_loaded(name_or_path, error)}") from error
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    method = found["quant_method"] if isinstance(found, dict) else found.quant_method
    if method != "bitsandbytes":
        raise ValueError(
            f"the files of {name_or_path!r} are quantized ({method}), and nothing can be merged into those; give the "
            "16-bit model that they were made from"
        )
    if quantizes:
        raise ValueError(
            f"the files of {name_or_path!r} are quantized already; leave load_in_4bit and load_in_8bit out"
        )
    check_package("bitsandbytes", "bitsandbytes", f"base_model={name_or_path!r}")


def dequantized_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of 4 or 8 bits with linear layers of its dtype in the place of the low-bit ones."""
    dtype = model.dtype
    whole: Any = model.dequantize(dtype=dtype)
    # How low-bit files were read would be undone on saving, which transformers cannot do.
    conversions = getattr(whole, "_weight_conversions", None) or []
    whole._weight_conversions = [each for each in conversions if not _reads_low_bits(each)]
    return whole.to(dtype)


def _reads_low_bits(conversion: Any) -> bool:
    steps = getattr(conversion, "operations", None) or ()
    return any(type(step).__module__ == "transformers.integrations.bitsandbytes" for step in steps)


def tokenizer_of(name_or_path: str, base: str, **options: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside an adapter or model, or, where there is none, that of its base model."""
    try:
        return load_tokenizer(name_or_path, **options)
    except (OSError, ValueError):
        return load_tokenizer(base, **options)


def processor_of(name_or_path: str, base: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> ProcessorMixin:
    """Loads the processor of images beside an adapter, or that of its base model, and gives it the tokenizer.

    Raises:
        OSError, ValueError: neither has one that can be loaded.
    """
    try:
        processor: Any = load_processor(name_or_path, **options)
    except (OSError, ValueError):
        processor = load_processor(base, **options)
    processor.tokenizer = tokenizer
    return cast(ProcessorMixin, processor)


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a base model what training gave it: rows for new tokens, the tokenizer's end token and pad token."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
    if tokenizer.eos_token is not None:
        set_eos_token(model, tokenizer, tokenizer.eos_token)
    if tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if model.can_generate():
            model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def float32_forward(model: torch.nn.Module) -> Iterator[None]:
    """Runs a model's forward in float32, whatever its weights' dtype: each module's own are cast while it runs."""
    stored: dict[torch.nn.Parameter, torch.Tensor] = {}

    def cast(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter not in stored:
                stored[parameter], parameter.data = parameter.data, parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in stored:
                parameter.data = stored.pop(parameter)

    modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(cast) for module in modules]
    handles += [module.register_forward_hook(restore, always_call=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probe_scores(model: PreTrainedModel | PeftModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Computes what a model says of token ids (1, T), in float32 arithmetic.

    Returns:
        The log-probs (T - 1,) float32 of the tokens; of a classifier its numbers, (labels,) float32.
    """
    with float32_forward(model):
        logits = model(input_ids=input_ids.to(base_model(model).device), use_cache=False).logits.float()
    if logits.dim() == 2:
        return logits.flatten().cpu()
    logprobs = logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, input_ids[0, 1:, None].to(logprobs.device)).squeeze(-1).cpu()
