"""Holds the helpers around models that TRL's trainers share with scripts."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import Accelerator, PartialState
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, TrainingArguments

from trl_fast.modeling.loading import add_adapter, is_quantized
from trl_fast.modeling.low_bit_layers import train_in_bfloat16
from trl_fast.parallel.engines import prepare_frozen
from trl_fast.parallel.gathering import gathered

# The ports that are tried first for a process group.
_USUAL_PORTS = (29500, 23456, 12355, 12345)
_HEADS_AND_EMBEDDINGS = ("lm_head", "embed_tokens", "wte", "wpe")


def create_model_from_path(model_id: str, architecture: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Loads a model by hub name or folder, float32 unless `dtype` says otherwise, on the GPU where there is one.

    architecture: the class to load it with; None: the one that its config names, else a causal language model.

    Raises:
        OSError: there is no such model.
    """
    if architecture is None:
        trusted = kwargs.get("trust_remote_code", False)
        names = AutoConfig.from_pretrained(model_id, trust_remote_code=trusted).architectures or [""]
        architecture = getattr(transformers, names[0], AutoModelForCausalLM)
    defaults = {"dtype": "float32", "device_map": "auto" if torch.cuda.is_available() else None}
    return architecture.from_pretrained(model_id, **{**defaults, **kwargs})


def get_config_model_id(config: PretrainedConfig) -> str:
    """Returns the hub name or folder that a model's config was loaded from; "" if it was made here."""
    return getattr(config, "_name_or_path", "")


def hash_module(module: torch.nn.Module) -> str:
    """Returns a SHA-256, in hexadecimal digits, of a module's weights and buffers; it tells whether they changed."""
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(str(tensor.dtype).encode())
        plain = tensor.detach().cpu()
        if plain.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            plain = plain.float()
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def use_adapter(model: PeftModel, adapter_name: str | None) -> Iterator[None]:
    """Makes one adapter of a model the active one while it is open; None switches all of them off."""
    if adapter_name is None:
        with model.disable_adapter():
            yield
        return
    before: Any = model.active_adapter
    model.set_adapter(adapter_name)
    try:
        yield
    finally:
        model.set_adapter(before)


def _checkpointing_switch(model: PreTrainedModel, does: str) -> Callable[..., None]:
    """Returns the method that does "enable" or "disable" checkpointing, by its name in this transformers."""
    return getattr(model, f"activation_checkpointing_{does}", None) or getattr(model, f"gradient_checkpointing_{does}")


@contextmanager
def disable_gradient_checkpointing(
    model: PreTrainedModel, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Iterator[None]:
    """Switches a model's gradient checkpointing off while it is open, and then on again with these arguments."""
    was_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if was_on:
        _checkpointing_switch(model, "disable")()
    try:
        yield
    finally:
        if was_on:
            _checkpointing_switch(model, "enable")(gradient_checkpointing_kwargs)


@contextmanager
def unwrap_model_for_generation(
    model: torch.nn.Module,
    accelerator: Accelerator,
    gather_deepspeed3_params: bool = True,
    generation_kwargs: dict[str, Any] | None = None,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> Iterator[Any]:
    """Gives the model inside accelerate's wrappers, without gradient checkpointing while it is open.

    Weights that FSDP or DeepSpeed shards are whole in it; all processes enter and leave together.

    Args:
        gather_deepspeed3_params: False: layers stay sharded, and all processes make the same forwards (`synced_gpus`).
        generation_kwargs: changes nothing here: what is given to transformers 5's `generate` wins over the model's own
            settings without help.
        gradient_checkpointing_kwargs: for switching checkpointing on again.
    """
    inner: Any = accelerator.unwrap_model(model)
    with (
        gathered(model, layers=gather_deepspeed3_params),
        disable_gradient_checkpointing(inner, gradient_checkpointing_kwargs),
    ):
        yield inner


def prepare_deepspeed(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Returns a model that does not train in an engine of DeepSpeed, sharded where the policy is (ZeRO-3)."""
    return prepare_frozen(accelerator, model)


def prepare_fsdp(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Returns a model that does not train, sharded by FSDP a layer at a time."""
    return prepare_frozen(accelerator, model)


def enable_gradient_checkpointing(model: PreTrainedModel, gradient_checkpointing_kwargs: Any) -> PreTrainedModel:
    """Switches a model's gradient checkpointing on; reentrant, with gradients at the embeddings, where they say so."""
    options = gradient_checkpointing_kwargs or {}
    _checkpointing_switch(model, "enable")(options)
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    return model


def prepare_peft_model(model: PreTrainedModel, peft_config: PeftConfig | None, args: TrainingArguments) -> Any:
    """Puts an adapter on a model, with gradient checkpointing as the arguments say; None puts none on.

    Raises:
        ValueError: the model has an adapter already.
    """
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model, args.gradient_checkpointing_kwargs)
    if peft_config is None:
        return model
    adapted = add_adapter(model, peft_config)
    if is_quantized(model):
        train_in_bfloat16(adapted)
    return adapted


def peft_module_casting_to_bf16(model: torch.nn.Module) -> None:
    """Makes norms float32, and float32 heads and embeddings bfloat16, as older TRL did for 4-bit models."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in _HEADS_AND_EMBEDDINGS) and getattr(weight, "dtype", None) == torch.float32:
            module.to(torch.bfloat16)


def empty_cache() -> None:
    """Gives the memory that torch's allocator keeps back to the device."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        getattr(torch, accelerator.type).empty_cache()


def ensure_master_addr_port(addr: str | None = None, port: int | None = None) -> None:
    """Sets MASTER_ADDR and MASTER_PORT for a process group: to what is set already, what is given, or a free port.

    A MASTER_PORT of 0 or auto counts as not set.
    """
    os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or addr or "localhost"
    present = os.environ.get("MASTER_PORT", "").strip()
    if port is None and present.isdecimal():
        port = int(present)
    os.environ["MASTER_PORT"] = str(port or _free_port())


def _free_port() -> int:
    for port in (*_USUAL_PORTS, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return listener.getsockname()[1]
    raise OSError("there is no free port")


@contextmanager
def global_then_local_main_first() -> Iterator[None]:
    """Lets the main process run a block first, then each machine's, then the others: for work that fills a cache."""
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def compute_accuracy(eval_pred: Any) -> Mapping[str, float]:
    """Computes how often the chosen completion's reward is the larger one, for `compute_metrics` of a RewardTrainer.

    eval_pred: predictions (P, 2), rewards of chosen and rejected, and labels (P,), the column of the better one.
    Pairs with equal rewards do not count.
    """
    predictions, labels = (torch.as_tensor(values) for values in eval_pred)
    decided = predictions[:, 0] != predictions[:, 1]
    right = predictions.argmax(-1)[decided] == labels[decided]
    return {"accuracy": right.float().mean().item()}
