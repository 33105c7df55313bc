"""Tells which engine shares a model among the processes, and has it prepare models that do not train."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import Trainer

from .agreement import decided_by_first


class Engine(Enum):
    """Names the engines, as people call them."""

    ONE = "one process"
    DDP = "DDP"
    ZERO0 = "DeepSpeed ZeRO-0"
    ZERO1 = "DeepSpeed ZeRO-1"
    ZERO2 = "DeepSpeed ZeRO-2"
    ZERO3 = "DeepSpeed ZeRO-3"
    FSDP1 = "FSDP1"
    FSDP2 = "FSDP2"
    TP = "tensor parallelism"

    @property
    def needs(self) -> EngineNeeds:
        """Returns what the engine does to a model."""
        return _NEEDS[self]

    @property
    def is_deepspeed(self) -> bool:
        """Tells whether it is one of DeepSpeed's."""
        return self in (Engine.ZERO0, Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)

    @property
    def is_fsdp(self) -> bool:
        """Tells whether it is FSDP, of either version."""
        return self in (Engine.FSDP1, Engine.FSDP2)


def original_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Returns the class that a module was made of: FSDP2 puts one of its own on modules that it shards."""
    classes = type(module).__mro__
    return classes[classes.index(FSDPModule) + 1] if isinstance(module, FSDPModule) else classes[0]


@dataclass(frozen=True)
class EngineNeeds:
    """Holds what an engine does to a model, and so what those who read the model's weights have to do.

    - `shards_weights`: after `prepare` a process holds a part of each weight only.
    - `shards_at_load`: weights are in parts (or empty) from the moment that the model is made.
    - `has_dtensors`: parameters are DTensors outside of forward.
    - `wraps_frozen`: a model that does not train has to be prepared too.
    """

    shards_weights: bool = False
    shards_at_load: bool = False
    has_dtensors: bool = False
    wraps_frozen: bool = False


_NEEDS = {
    Engine.ONE: EngineNeeds(),
    Engine.DDP: EngineNeeds(),
    Engine.ZERO0: EngineNeeds(),
    Engine.ZERO1: EngineNeeds(),
    Engine.ZERO2: EngineNeeds(),
    Engine.ZERO3: EngineNeeds(shards_weights=True, shards_at_load=True, wraps_frozen=True),
    Engine.FSDP1: EngineNeeds(shards_weights=True, wraps_frozen=True),
    Engine.FSDP2: EngineNeeds(shards_weights=True, has_dtensors=True, wraps_frozen=True),
    Engine.TP: EngineNeeds(shards_weights=True, shards_at_load=True, has_dtensors=True),
}

_ZERO_STAGES = (Engine.ZERO0, Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)


def engine_of(accelerator: Accelerator) -> Engine:
    """Returns the engine that an accelerator's processes share a model by.

    Raises:
        NotImplementedError: the accelerator uses an engine that is none of these.
    """
    state, kind = accelerator.state, accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        return _ZERO_STAGES[int(state.deepspeed_plugin.zero_stage)]
    if kind is DistributedType.FSDP:
        return Engine.FSDP2 if state.fsdp_plugin.fsdp_version == 2 else Engine.FSDP1
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.tp_enabled:
        return Engine.TP
    if kind in (DistributedType.XLA, DistributedType.MEGATRON_LM):
        raise NotImplementedError(f"distributed_type={kind.value}: expected one process, DDP, FSDP or DeepSpeed")
    return Engine.ONE if accelerator.num_processes == 1 else Engine.DDP


def keep_float32_outputs(accelerator: Accelerator) -> None:
    """Has FSDP2 leave what a model returns as it is, before it is prepared.

    With mixed precision accelerate asks for 16-bit outputs, and so rounds log-probabilities and losses too.
    """
    if engine_of(accelerator) is Engine.FSDP2:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def keep_buffers_apart(accelerator: Accelerator) -> None:
    """Has an accelerator prepare models for FSDP2 whose state dicts have buffers too, as Gemma 4's."""
    if engine_of(accelerator) is not Engine.FSDP2:
        return
    prepare = accelerator.prepare

    def prepare_apart(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for model in (each for each in args if isinstance(each, torch.nn.Module)):
                stack.enter_context(_buffers_apart(model))
            return prepare(*args, **kwargs)

    vars(accelerator)["prepare"] = prepare_apart


@contextmanager
def _buffers_apart(model: torch.nn.Module) -> Iterator[None]:
    """Leaves buffers out of a model's state dict while FSDP2 shards it, with the values of the first process.

    accelerate takes all that a state dict names for parameters in parts, and fails. What is not named there it leaves
    as each process has it.
    """
    owned = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    values = decided_by_first(lambda: [buffer.detach().cpu() for _, _, buffer in owned])
    for (module, name, _), value in zip(owned, values, strict=True):
        module.register_buffer(name, value, persistent=False)
    try:
        yield
    finally:
        for module, name, _ in owned:
            module._non_persistent_buffers_set.discard(name)


@contextmanager
def saved_whole(accelerator: Accelerator) -> Iterator[None]:
    """Has transformers save whole weights within the context: with SHARDED_STATE_DICT it would save none at all."""
    plugin = accelerator.state.fsdp_plugin if engine_of(accelerator).is_fsdp else None
    kind = None if plugin is None else plugin.state_dict_type
    try:
        if plugin is not None:
            plugin.state_dict_type = StateDictType.FULL_STATE_DICT
        yield
    finally:
        if plugin is not None:
            plugin.state_dict_type = kind


@contextmanager
def prepared_for_evaluation(trainer: Trainer) -> Iterator[None]:
    """Prepares a trainer's model for an evaluation before training, so that training can prepare it still.

    accelerate shards a model by FSDP2 together with an optimizer only. And what it has prepared for evaluation it
    would not wrap by DDP any more: each process would train a model of its own.
    """
    accelerator, model = trainer.accelerator, cast(Any, trainer.model)
    engine, before = engine_of(accelerator), [id(each) for each in accelerator._models]
    if engine is Engine.FSDP2 and not any(isinstance(module, FSDPModule) for module in model.modules()):
        # In place: the model, or what PPO has it in together with its value model.
        with _buffers_apart(trainer.model_wrapped):
            accelerator._models.append(fsdp2_prepare_model(accelerator, trainer.model_wrapped))
    yield
    if engine is Engine.FSDP2:
        for module in trainer.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    if engine is Engine.DDP and id(model) not in before and any(each is model for each in accelerator._models):
        accelerator._models = [each for each in accelerator._models if each is not model]
        model._is_accelerate_prepared = False
        if "_original_forward" in vars(model):  # under autocast, which comes again
            model.forward = vars(model).pop("_original_forward")


def prepare_frozen(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """Returns a model that does not train (a reference, a reward model) where and as the engine holds the policy.

    Engines that shard weights shard this one's too, a layer at a time, so that no more than a layer of it is whole at
    once.
    """
    engine = engine_of(accelerator)
    if engine.is_deepspeed:
        return _prepare_by_deepspeed(accelerator.state.deepspeed_plugin, model)
    if engine is Engine.FSDP2:
        with _wrapping(accelerator.state.fsdp_plugin, model), _buffers_apart(model):
            prepared: Any = fsdp2_prepare_model(accelerator, model).eval()
        # Without a backward pass that does so, what accelerate has gathered for it would stay whole.
        prepared.set_reshard_after_forward(True)
        return prepared
    if engine is Engine.FSDP1:
        with _wrapping(accelerator.state.fsdp_plugin, model):
            wrapped = accelerator.prepare_model(model)
        accelerator._models.remove(wrapped)  # what accelerate clips and saves is the policy's
        return wrapped.eval()
    return accelerator.prepare_model(model, evaluation_mode=True)


def _prepare_by_deepspeed(plugin: Any, model: Any) -> torch.nn.Module:
    """Wraps a model in an engine of DeepSpeed without an optimizer, configured as the policy's otherwise.

    So its weights get the policy's dtype. Those of ZeRO-1 and ZeRO-2 are whole.
    """
    import deepspeed

    config = copy.deepcopy(plugin.deepspeed_config)
    for name in ("optimizer", "scheduler", "gradient_clipping"):
        config.pop(name, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    zero["stage"] = 3 if zero["stage"] == 3 else 0  # the other stages share what only training has
    # What the policy's get when it is prepared: sizes that go by the width of the layers.
    width = model.config.get_text_config().hidden_size
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero |= {name: size for name, size in sizes.items() if zero.get(name, "auto") == "auto"}
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()  # returns nothing
    return engine


@contextmanager
def _wrapping(plugin: Any, model: torch.nn.Module) -> Iterator[None]:
    """Has FSDP shard `model` by its own layers' classes where the policy's are not in it."""
    policy, names = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    classes = {type(module).__name__ for module in model.modules()}
    try:
        if names is not None and not classes & set(names):
            plugin.transformer_cls_names_to_wrap = None
            plugin.auto_wrap_policy = getattr(policy, "func", policy)
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, names
