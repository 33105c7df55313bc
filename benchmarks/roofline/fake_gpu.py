"""A GPU that is not there: code that runs on fake tensors takes the ways that it takes on a CUDA device.

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

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_fast.ops import backends
from trl_fast.ops.backends import Support, load_extension
from trl_fast.planning.answers import ANSWERS
from trl_fast.planning.devices import replaced

from .gpus import Gpu

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Operators that a build with CUDA has kernels of, and that a build without takes apart before they can be seen.
_WHOLE_ON_CUDA = ("silu_backward", "native_layer_norm", "native_layer_norm_backward")
Observer = Callable[[torch._ops.OpOverload, tuple, dict, Any], None]
_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)


@contextmanager
def fake_gpu(gpu: Gpu, observe: Observer | None = None) -> Iterator[None]:
    """Within, tensors are fake and torch has a CUDA device.

    observe: called with every operator that has run, its arguments, keyword arguments and result.
    """
    functions = _Devices()
    with ExitStack() as stack:
        stack.enter_context(_attribute(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(_registered(_WHOLE_ON_CUDA))
        stack.enter_context(replaced(torch.cuda, **_cuda_answers(gpu)))
        stack.enter_context(replaced(torch.cuda.amp.common, amp_definitely_not_available=lambda: False))
        run = torch.autograd._engine_run_backward
        stack.enter_context(replaced(torch.autograd, _engine_run_backward=_within(functions, run)))
        stack.enter_context(replaced(_foreach_utils, _foreach_supported_types=[torch.Tensor, FakeTensor]))
        stack.enter_context(replaced(backends, _supports_cuda=_supports_cuda, _supports_triton=_supports_triton))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), functions, _Operators(functions, observe)):
            stack.enter_context(mode)
        yield


def is_on_gpu(tensor: Any) -> bool:
    """Whether this is a fake tensor on the GPU."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _supports_cuda(device: torch.device) -> Support:
    loaded = load_extension()
    return Support(device.type == "cuda", "counted, not run") if loaded.ok else loaded


def _supports_triton(device: torch.device) -> Support:
    return Support(False, "fake tensors have no memory that Triton kernels could be launched on")


class _Devices(TorchFunctionMode):
    """Knows where a call from Python wants its tensor: factories without a device and `.cpu()` mean the host."""

    host = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _indexed(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_indexed(value) if isinstance(value, (str, torch.device)) else value for value in args)
        before, self.host = self.host, self._wants_host(func, args, kwargs)
        try:
            if self.host and args and is_on_gpu(args[0]):
                options = {"dtype": _dtype(args, kwargs), "non_blocking": kwargs.get("non_blocking", False)}
                return aten._to_copy(args[0], device=CPU, **options)
            if func is torch.Tensor.to and _device_of(args[0]) in (*args[1:], kwargs.get("device")):
                args, kwargs = _without_device(args, kwargs)
            return func(*args, **kwargs)
        finally:
            self.host = before

    @staticmethod
    def _wants_host(func: Callable, args: tuple, kwargs: dict) -> bool:
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return func is torch.Tensor.cpu or func is torch.Tensor.to and CPU in leaves
        return func not in _BACKWARD


def _indexed(device: str | int | torch.device) -> torch.device:
    """A device as fake tensors have it: the GPU with its index."""
    return CPU if str(device) == "cpu" else torch.device(device) if str(device) == "meta" else CUDA


def _device_of(tensor: torch.Tensor) -> torch.device:
    return CUDA if is_on_gpu(tensor) else CPU


def _dtype(args: tuple, kwargs: dict) -> torch.dtype | None:
    """The dtype that a call of `.to` asks for."""
    return next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)), None)


def _without_device(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a `.to` to where the tensor is."""
    rest = tuple(value for value in args if not isinstance(value, torch.device))
    return rest, {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}


class _Operators(TorchDispatchMode):
    """Runs every operator on fake tensors and shows it to an observer.

    C++ is told that all is on the CPU, and what it makes is made on the GPU all the same. The project's own custom
    operators are run by their bodies. What depends on data is answered as in the planner.
    """

    def __init__(self, functions: _Devices, observe: Observer | None) -> None:
        super().__init__()
        self._functions = functions
        self._observe = observe

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return CPU
        own = OPDEFS.get(func.name())
        if own is not None:
            with self._functions, self:
                return own._init_fn(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if kwargs.get("device") == CPU and not self._functions.host:
            kwargs["device"] = CUDA
        out = self._run(func, args, kwargs)
        if self._observe is not None:
            self._observe(func, args, kwargs, out)
        return out

    @staticmethod
    def _run(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
        if func in (aten.mm.dtype_out, aten.addmm.dtype_out):
            # Its fake implementation looks for the device's guard.
            return kwargs["out"]
        answer = ANSWERS.get(func)
        out = NotImplemented if answer is None else answer(*args, **kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out


@functools.cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is made of others; inside of custom operators they come in one piece."""
    name = func.name()
    whole = func._schema.name.removeprefix("aten::") in _WHOLE_ON_CUDA
    return not whole and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _within(mode: TorchFunctionMode, run: Callable) -> Callable:
    """`run` with the mode on: torch turns it off in what a function calls, and backward passes are Python again."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return wrapped


@contextmanager
def _attribute(owner: type, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _registered(names: tuple[str, ...]) -> Iterator[None]:
    """Within, these operators have kernels on CUDA, which are never called: so they reach the modes in one piece."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in names:
            library.impl(name, _never_run, "CUDA")
        yield


def _never_run(*_: Any) -> None:
    raise AssertionError("an operator on a fake tensor was run")


def _cuda_answers(gpu: Gpu) -> dict[str, Callable]:
    """What torch.cuda says on such a GPU, all of whose memory is free."""
    properties = SimpleNamespace(name=gpu.name, total_memory=gpu.memory_bytes, multi_processor_count=132)
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
        "mem_get_info": lambda *_: (gpu.memory_bytes, gpu.memory_bytes),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
    }
