"""Simulates a GPU: code on fake tensors takes the ways that it takes on a CUDA device.

Fake tensors (torch's FakeTensorMode) on a CUDA device have shapes, dtypes and no data. Python sees their device as it
is, and so does the choice of kernels; torch's C++ code, which would look for the device's guards and streams and
abort in a build without CUDA, is told that they are on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from trl_fast.ops.device import DeviceFacts, DeviceMemory, simulated_device
from trl_fast.planning.device_facts import DeviceMeter, SimulatedFlexAttention, gpu_serves
from trl_fast.planning.gpu_facts import Gpu
from trl_fast.planning.roofline.launches import stand_in

from .fake_devices import Devices, is_on_gpu, listed
from .operator_counter import Counter
from .operator_mode import WHOLE_ON_CUDA, Operators

_GROUP = "_group_tensors_by_device_and_dtype"


@contextmanager
def answering(gpu: Gpu, counter: Counter) -> Iterator[None]:
    """Lets torch and the choice of backends, within, speak of such a GPU; tensors are as they were.

    counter: knows how much of the GPU's memory is taken.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(patch.object(FakeTensor, "is_cuda", property(is_on_gpu), create=True))
        stack.enter_context(patch.object(FakeTensor, "tolist", listed))
        stack.enter_context(patch.multiple(torch.cuda, **_cuda_answers(gpu, counter)))
        stack.enter_context(patch.multiple(torch.cuda.amp.common, amp_definitely_not_available=lambda: False))
        stack.enter_context(patch.multiple(_foreach_utils, _foreach_supported_types=[torch.Tensor, FakeTensor]))
        stack.enter_context(patch.object(torch._C, _GROUP, _grouped_by_device(getattr(torch._C, _GROUP))))
        stack.enter_context(simulated_device(_facts(gpu, counter), on="cuda"))
        yield


@contextmanager
def fake_gpu(gpu: Gpu, counter: Counter) -> Iterator[None]:
    """Makes tensors fake and gives torch a CUDA device within; the counter sees every operator."""
    devices = Devices()
    with ExitStack() as stack:
        stack.enter_context(answering(gpu, counter))
        stack.enter_context(_registered(WHOLE_ON_CUDA))
        run = torch.autograd._engine_run_backward
        stack.enter_context(patch.multiple(torch.autograd, _engine_run_backward=_within(devices, run)))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), devices, Operators(devices, counter.observe)):
            stack.enter_context(mode)
        yield


def _grouped_by_device(usual: Callable[..., dict]) -> Callable[..., dict]:
    """Groups lists of tensors as torch's function does, by the devices that Python sees."""

    def grouped(tensors: list[list[torch.Tensor | None]], with_indices: bool = False) -> dict:
        groups = usual(tensors, with_indices)
        return {(lists[0][0].device, dtype): (lists, *rest) for (_, dtype), (lists, *rest) in groups.items()}

    return grouped


def _facts(gpu: Gpu, counter: Counter) -> DeviceFacts:
    """Returns what our code is told of the GPU: the kernels that a plan has, too, serve it."""
    return DeviceFacts(
        "cuda",
        multiplies_bf16=True,
        capability=gpu.capability,
        read_memory=lambda: DeviceMemory(
            gpu.memory_bytes - counter.live_bytes, gpu.memory_bytes, counter.live_bytes, counter.highest_bytes
        ),
        serves=gpu_serves,
        launches=stand_in(counter.launch),
        flex_attention=functools.partial(SimulatedFlexAttention.apply, _flex_meter(counter)),
    )


def _flex_meter(counter: Counter) -> DeviceMeter:
    """Returns what counts FlexAttention's kernels, which torch would compile for the GPU that is not there."""
    return DeviceMeter(attended=lambda flops, read, written: counter.add("flex_attention", read, written, flops))


def _within(mode: TorchFunctionMode, run: Callable) -> Callable:
    """Calls `run` with the mode on: torch turns it off in what a function calls, and backward passes are Python."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return wrapped


@contextmanager
def _registered(names: tuple[str, ...]) -> Iterator[None]:
    """Gives these operators kernels on CUDA within, which are never called: so they reach the modes in one piece."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in names:
            library.impl(name, _never_run, "CUDA")
        yield


def _never_run(*_: Any) -> None:
    raise AssertionError("an operator on a fake tensor was run")


def _cuda_answers(gpu: Gpu, counter: Counter) -> dict[str, Callable]:
    """Returns torch.cuda's answers on such a GPU, whose allocator holds nothing beyond what tensors take."""
    properties = SimpleNamespace(name=gpu.name, total_memory=gpu.memory_bytes, multi_processor_count=132)
    stats = lambda: {  # noqa: E731
        "allocated_bytes.all.current": counter.live_bytes,
        "reserved_bytes.all.current": counter.live_bytes,
        "allocated_bytes.all.peak": counter.highest_bytes,
    }
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "device": lambda *_: nullcontext(),
        "get_device_capability": lambda *_: gpu.capability,
        "get_device_properties": lambda *_: properties,
        "get_per_process_memory_fraction": lambda *_: 1.0,
        "mem_get_info": lambda *_: (gpu.memory_bytes - counter.live_bytes, gpu.memory_bytes),
        "memory_stats": lambda *_: stats(),
        "memory_allocated": lambda *_: counter.live_bytes,
        "memory_reserved": lambda *_: counter.live_bytes,
        "max_memory_allocated": lambda *_: counter.highest_bytes,
    }
