"""Makes the weights of a sharded model whole: all for a generation, or a module's at a time to send them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .partitions import is_partitioned, whole_in_forward, whole_parameters

# On a model whose weights are whole for the time being.
_IS_GATHERED = "trl_fast_is_gathered"


@contextmanager
def gathered(model: torch.nn.Module, *, part: torch.nn.Module | None = None, layers: bool = True) -> Iterator[None]:
    """Holds the weights of a model whole in every process within the context, so that forwards exchange nothing.

    All processes enter and leave together; in between each may make as many forwards without gradient as it likes. A
    context within another one changes nothing, and a model that is not sharded needs none.

    Args:
        model: as its engine prepared it: with FSDP's or DeepSpeed's wrapper, if it has one.
        part: a module in it whose weights are enough; None: all of it. FSDP1 makes all whole.
        layers: False leaves layers sharded, each to be gathered for its turn in a forward, which all processes then
            make together. What FSDP has outside of layers is whole, so that a part of the model can be called.
    """
    if getattr(model, _IS_GATHERED, False) or not is_sharded(model):
        yield
        return
    holder: Any = model
    setattr(holder, _IS_GATHERED, True)
    try:
        with _whole(model, model if part is None else part, layers):
            yield
    finally:
        delattr(holder, _IS_GATHERED)


def _whole(model: torch.nn.Module, part: torch.nn.Module, layers: bool) -> AbstractContextManager[None]:
    if isinstance(model, FullyShardedDataParallel):
        return _gathered_by_fsdp1(model) if layers else _outermost_gathered_by_fsdp1(model)
    if any(map(is_partitioned, model.parameters())):
        # Before a model is prepared, it has no hooks that gather a layer.
        by_layer = nullcontext() if hasattr(model, "optimizer") else whole_in_forward(model)
        return _gathered_by_zero3(model, part) if layers else by_layer
    outermost = next(each for each in model.modules() if isinstance(each, FSDPModule))
    inner: list[FSDPModule] = [
        each for each in part.modules() if isinstance(each, FSDPModule) and each is not outermost
    ]
    return _gathered_by_fsdp2([outermost, *(inner if layers else [])])


def is_sharded(model: torch.nn.Module) -> bool:
    """Tells whether processes hold parts of a model's weights, so that a forward of it waits for all of them."""
    if any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


@contextmanager
def _gathered_by_fsdp2(parts: list[FSDPModule]) -> Iterator[None]:
    # The outermost one, the first, is known as such before one of those in it is called by itself.
    parts[0]._get_fsdp_state()._lazy_init()
    groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    after_forward = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        # What is None stays whole after a forward.
        group.post_forward_mesh_info = None
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for group, info in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = info


@contextmanager
def whole_until_backward(module: torch.nn.Module) -> Iterator[None]:
    """Leaves a module's weights whole after its forward within the context, where FSDP2 gathers it: others read them.

    With gradients they stay so until backward is through.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    groups = module._get_fsdp_state()._fsdp_param_groups
    after_forward = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None
    try:
        yield
    finally:
        for group, info in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = info
        if not torch.is_grad_enabled():
            module.reshard()


def _outermost_gathered_by_fsdp1(model: FullyShardedDataParallel) -> AbstractContextManager[None]:
    return FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False)


@contextmanager
def _gathered_by_fsdp1(model: FullyShardedDataParallel) -> Iterator[None]:
    parts = FullyShardedDataParallel.fsdp_modules(model)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for part in parts:
            # FSDP1's own forward would gather, and free, what is there already.
            vars(part)["forward"] = part.module
        try:
            yield
        finally:
            for part in parts:
                del vars(part)["forward"]


@contextmanager
def _gathered_by_zero3(model: Any, part: torch.nn.Module) -> Iterator[None]:
    with whole_parameters(part.parameters()):
        # Of a model that is not trained, the offload itself is in the optimizer's place.
        optimizer = getattr(model, "optimizer", None)
        offload = getattr(optimizer, "parameter_offload", optimizer)
        if offload is not None:
            _remove_hooks(offload)
        try:
            yield
        finally:
            if offload is not None:
                _add_hooks(offload)


def _remove_hooks(offload: Any) -> None:
    """Takes off DeepSpeed's hooks, which free a layer's weights after its forward and compare processes before it."""
    for weight in offload.module.parameters():
        weight.ds_active_sub_modules.clear()
    for hook in [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _add_hooks(offload: Any) -> None:
    """Puts DeepSpeed's hooks back; the order in which layers were gathered is learned anew."""
    begin = lambda module, *args: offload.get_param_coordinator().reset_step()  # noqa: E731
    offload.fwd_pre_hook = offload.module.register_forward_pre_hook(begin)
    offload._register_deepspeed_module(offload.module)


@contextmanager
def whole_module(model: torch.nn.Module, path: str, *, recurse: bool) -> Iterator[torch.nn.Module]:
    """Holds the parameters of a module of a sharded model whole within the context, in every process, and yields it.

    All processes enter and leave together. They may read the parameters; what they write into one is lost, or has to
    be taken back by them. FSDP1 makes whole what it has sharded together with them, and frees that memory afterwards.

    Args:
        model: the model, as its engine prepared it.
        path: the module's name.
        recurse: whether the parameters of the modules in it are whole too.
    """
    module = model.get_submodule(path)
    modules = [*module.modules()] if recurse else [module]
    parameters = [parameter for part in modules for parameter in part.parameters(recurse=False)]
    context: AbstractContextManager[None]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        context = _replaced_by_whole(modules)
    elif any(map(is_partitioned, parameters)):
        context = whole_parameters(parameters)
    else:
        context = _summoned(_fsdp1_units(model, modules))
    with context:
        yield module


@contextmanager
def _replaced_by_whole(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Puts whole copies in the places of FSDP2's parameters."""
    held = [dict(module._parameters) for module in modules]
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    whole = parameter.detach().full_tensor()
                    module._parameters[name] = torch.nn.Parameter(whole, requires_grad=False)
        yield
    finally:
        for module, parameters in zip(modules, held, strict=True):
            module._parameters.update(parameters)


def _fsdp1_units(model: torch.nn.Module, modules: list[torch.nn.Module]) -> list[FullyShardedDataParallel]:
    """Returns those of FSDP1's wrappers that hold the parameters of modules; none where it has sharded nothing."""
    owners: dict[int, FullyShardedDataParallel] = {}
    # A wrapper comes before those in it, which own what they hold.
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        owners |= dict.fromkeys(map(id, unit.modules()), unit)
    units = {id(owners[id(module)]): owners[id(module)] for module in modules if id(module) in owners}
    return [*units.values()]


@contextmanager
def _summoned(units: list[FullyShardedDataParallel]) -> Iterator[None]:
    with ExitStack() as stack:
        for unit in units:
            stack.enter_context(unit.summon_full_params(unit, recurse=False, writeback=False))
        yield
