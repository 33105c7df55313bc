"""Reads models whose parameters DeepSpeed ZeRO-3 keeps in parts: sizes, values, and forward passes before `prepare`.

A model that is made while ZeRO-3 is configured has empty parameters: each process holds a part of each beside them.
The engine's hooks, which make them whole in time, come with `prepare`. What looks at the model before goes through
here. For parameters that are whole all of this costs nothing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

# On a parameter: what takes the gradient of its part.
_PART = "trl_fast_part"


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Tells whether ZeRO-3 keeps a parameter, of any shape, in parts, be it whole at the moment or not."""
    return hasattr(parameter, "ds_status")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Returns the shape of a parameter as the model has it, be it here or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_size(parameter: torch.Tensor) -> int:
    """Returns how many numbers a parameter of any shape has as the model has it, be they here or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole_parameters(parameters: Iterable[torch.Tensor], *, written: bool = False) -> Iterator[None]:
    """Makes parameters, of any shape, whole within the context. All processes have to call this.

    written: whether what the first process writes into them is kept, by all of them.
    """
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if written else None):
        yield


def leave_in_parts(model: torch.nn.Module) -> None:
    """Frees the parameters that ZeRO-3 keeps whole between steps, small ones; the next forward pass gathers them anew.

    What is written into a part after this call is then seen.
    """
    parameters: Iterable[Any] = model.parameters()
    for parameter in parameters:
        if is_partitioned(parameter):
            parameter.partition()


@contextmanager
def whole_in_forward(model: torch.nn.Module) -> Iterator[None]:
    """Lets a model that is not prepared yet run: parameters are whole while a module's forward runs that reads them.

    They are its own, or those of a module that it does not call: DeltaNet reads its convolution's weight. No more than
    what the running modules need is whole at once. All processes have to make the same forward passes. Gradients are
    not for this.
    """
    if not any(map(is_partitioned, model.parameters())):
        yield
        return
    calls: list[ExitStack] = []
    with ExitStack() as stack:
        for module in model.modules():
            parts = [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]
            before = module.register_forward_pre_hook(partial(_gather, parts, calls))
            after = module.register_forward_hook(partial(_release, calls), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
            if parts:
                stack.callback(setattr, module, "_parameters", module._parameters)
                module._parameters = _WholeWhenRead(module._parameters, calls)
        yield


def part_with_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """Returns a tensor that takes the gradient of this process's part of a parameter, one and the same in every pass.

    (S,), of the dtype in which gradients are summed. What autograd finds for it is to be the mean over processes, of
    the part with its padding; it goes to the optimizer of ZeRO-3 as what DeepSpeed itself has reduced, once a backward
    pass. The parameter is to have no other gradient in that pass. None: the optimizer takes gradients only whole,
    because they are compressed on their way, say. parameter: any shape, one that ZeRO-3 keeps in parts and trains.
    """
    holder: Any = parameter
    optimizer = getattr(holder, "_z3_optimizer", None)
    if optimizer is None or not _takes_parts(optimizer, holder):
        return None
    before = getattr(holder, _PART, None)
    if before is not None and before.optimizer() is optimizer:
        return before.part
    # Its numbers are never read.
    zero = torch.zeros((), dtype=optimizer.gradient_accumulation_dtype, device=parameter.device)
    part = zero.expand(holder.partition_numel()).requires_grad_()
    part.register_post_accumulate_grad_hook(partial(_hand_over, weakref.ref(parameter), weakref.ref(optimizer)))
    setattr(holder, _PART, _Part(part, weakref.ref(optimizer)))
    return part


class _Part(NamedTuple):
    """Holds what takes the gradient of a parameter's part (S,), and the optimizer that gets it."""

    part: torch.Tensor
    optimizer: Callable[[], Any]


def _takes_parts(optimizer: Any, parameter: Any) -> bool:
    """Tells whether the gradient that DeepSpeed keeps of a part is the plain mean over processes."""
    in_leaf_module = hasattr(parameter, "ds_z3_leaf_module")
    compressed = getattr(optimizer, "all2all_process_group", None) is not None
    special = optimizer.zenflow or optimizer.autoep_folding_tp_group is not None or optimizer._coalesce_grad_reduction
    return not (in_leaf_module or compressed or special)


def _hand_over(parameter: Callable[[], Any], optimizer: Callable[[], Any], part: torch.Tensor) -> None:
    """Gives the optimizer of ZeRO-3 the gradient (S,) of a parameter's part, as if its own hook had reduced it."""
    from deepspeed.accelerator import get_accelerator

    gradient, part.grad = part.grad, None
    device, zero3 = get_accelerator(), optimizer()
    stream = zero3.reduce_and_partition_stream
    if not device.resolves_data_dependency():
        stream.wait_stream(device.current_stream())
    with device.stream(stream):
        zero3.partition_grads([parameter()], [gradient])
    if not device.is_synchronized_device():
        assert gradient is not None, "autograd has just found it"
        gradient.record_stream(stream)
    # What a hook of DeepSpeed's asks for: the gradients are taken up when backward ends.
    zero3.queue_post_backward_callback()


@torch.no_grad()
def copy_partitioned(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a model that ZeRO-3 keeps in parts, in equal parts: `copy.deepcopy` would copy empty ones.

    All processes have to call this.
    """
    with no_init_weights():
        copied = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    parts: Iterable[tuple[Any, Any]] = zip(copied.parameters(), model.parameters(), strict=True)
    for target, source in parts:
        target.ds_tensor.copy_(source.ds_tensor)
    for buffer, source in zip(copied.buffers(), model.buffers(), strict=True):
        buffer.copy_(source)
    return copied.train(model.training)


class _WholeWhenRead(dict[str, Any]):
    """Holds a module's parameters, and makes one whole that is read for as long as the innermost forward runs."""

    def __init__(self, parameters: dict[str, Any], calls: list[ExitStack]) -> None:
        super().__init__(parameters)
        self._calls = calls

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if self._calls and parameter is not None and is_partitioned(parameter):
            self._calls[-1].enter_context(whole_parameters(_not_whole([parameter])))
        return parameter


def _not_whole(parts: list[Any]) -> list[Any]:
    """Returns those that are not whole already, for a module around or a generation."""
    return [part for part in parts if part.ds_status.name == "NOT_AVAILABLE"]


def _gather(parts: list[Any], calls: list[ExitStack], *_: object) -> None:
    calls.append(ExitStack())
    calls[-1].enter_context(whole_parameters(_not_whole(parts)))


def _release(calls: list[ExitStack], *_: object) -> None:
    calls.pop().close()
