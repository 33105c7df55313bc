"""Reads and sets the weights of a model that an engine has sharded: the part of this process, or the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0

from .engines import Engine, engine_of
from .partitions import is_partitioned, leave_in_parts, whole_parameters


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the part of a parameter (of any shape) that this process holds: a view, without gradient.

    What is written into it changes the parameter. Where no engine has sharded it, that is all of it. Models of one
    architecture that one engine has sharded have parts of the same shapes.
    """
    sharded: Any = parameter.detach()
    if hasattr(sharded, "to_local"):  # a DTensor: FSDP2, tensor parallelism
        return sharded.to_local()
    return getattr(parameter, "ds_tensor", sharded)  # ZeRO-3's part; FSDP1's parameters are views of it


def local_shards(model: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the parts of a model's parameters, of any shapes, that this process holds, as `local_shard` does.

    What is whole for the moment is sharded first. Of FSDP1 a part is that of all parameters of a unit.
    """
    if isinstance(model, FullyShardedDataParallel):
        units: Any = [unit for unit in FullyShardedDataParallel.fsdp_modules(model) if unit._has_params]
        for unit in units:
            _reshard(unit, unit._handle, True)
        return [unit._flat_param._local_shard for unit in units]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    leave_in_parts(model)
    return [local_shard(parameter) for parameter in model.parameters()]


def has_read_weights() -> bool:
    """Tells whether this process reads the files of a model that it loads.

    With `fsdp_cpu_ram_efficient_loading` one process of each machine does, and the others' weights are any numbers
    until the engine has sent them the right ones.
    """
    return not is_fsdp_enabled() or is_local_dist_rank_0()


def whole_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a prepared model's state dict with whole tensors, gathered in small parts into the CPU's memory.

    All processes have to call this. Where the engine shards weights, only the first process gets them, the others an
    empty dict.
    """
    if engine_of(accelerator) is Engine.FSDP1:
        first = accelerator.is_main_process
        return {name: part.detach().to("cpu", copy=True) for name, part in _by_units(model) if first}
    if engine_of(accelerator) is Engine.ZERO3:
        # accelerate would refuse what DeepSpeed's configuration does not let it save.
        return _gather_partitioned(accelerator, model)
    return accelerator.get_state_dict(model)


def set_whole_weights(accelerator: Accelerator, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Sets a prepared model's weights from whole tensors, of their own shapes, which only the first process needs.

    All processes have to call this. A name that is missing keeps its value, as that of a tied weight under its other
    name.

    Raises:
        NotImplementedError: the engine shards weights in a way for which this is not written.
    """
    engine = engine_of(accelerator)
    if engine is Engine.FSDP2:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, dict(weights), options=options)
    elif engine is Engine.FSDP1:
        for name, parameter in _by_units(model):
            if accelerator.is_main_process and name in weights:
                parameter.data.copy_(weights[name])
            torch.distributed.broadcast(parameter.data, 0)
    elif engine is Engine.ZERO3:
        _set_partitioned(accelerator, model, weights)
    elif engine.needs.shards_weights:
        raise NotImplementedError(f"weights of a model that {engine.value} shards cannot be set yet")
    else:
        accelerator.unwrap_model(model).load_state_dict(weights, strict=False)


def _by_units(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Gives the parameters of an FSDP1 model by name, one of the units at a time whole that it shards them by."""
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        with torch.no_grad(), FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True):
            for name, parameter in unit.named_parameters():
                if parameter.numel():  # else one of a unit within this one
                    yield f"{prefixes[id(unit)]}{name}".replace("_fsdp_wrapped_module.", ""), parameter


def _gather_partitioned(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the whole weights of a model under ZeRO-3 to the first process, gathered one by one."""
    found = {}
    for name, weight in accelerator.unwrap_model(model).state_dict(keep_vars=True).items():
        with whole_parameters([weight]):
            if accelerator.is_main_process:
                found[name] = weight.detach().to("cpu", copy=True)
    return found


@torch.no_grad()
def _set_partitioned(accelerator: Accelerator, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Sets the weights of a model under ZeRO-3, one by one whole."""
    for name, weight in accelerator.unwrap_model(model).state_dict(keep_vars=True).items():
        with whole_parameters([weight], written=True):
            if name in weights:
                weight.copy_(weights[name])
        if not is_partitioned(weight):  # a buffer, which every process has whole
            torch.distributed.broadcast(weight, 0)
