"""Runs operators on fake tensors of a GPU that is not there, and shows them to an observer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from trl_fast.planning.data_dependent_operators import run_on_fakes
from trl_fast.planning.roofline.known_values import follow

from .fake_devices import CPU, CUDA, Devices

aten = torch.ops.aten
Observer = Callable[[torch._ops.OpOverload, tuple, dict, Any], None]
# Operators that a build with CUDA has kernels of, and that a build without takes apart before they can be seen.
WHOLE_ON_CUDA = ("silu_backward", "native_layer_norm", "native_layer_norm_backward")
# Their fake implementations look for the device's guard; the result is where they write.
_INTO_OUT = (aten.mm.dtype_out, aten.addmm.dtype_out)


class Operators(TorchDispatchMode):
    """Runs every operator on fake tensors and shows it, its arguments and its result to an observer.

    C++ is told that all is on the CPU, and what it makes is made on the GPU all the same. The project's own custom
    operators are run by their bodies. What depends on data comes from known values, or is answered as in the planner.
    """

    def __init__(self, devices: Devices, observe: Observer) -> None:
        super().__init__()
        self._devices = devices
        self._observe = observe

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return CPU
        own = OPDEFS.get(func.name())
        if own is not None:
            with self._devices, self:
                return own._init_fn(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if kwargs.get("device") == CPU and not self._devices.host:
            kwargs["device"] = CUDA
        out = _run(func, args, kwargs)
        follow(func, args, kwargs, out)
        self._observe(func, args, kwargs, out)
        return out


def _run(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    if func in _INTO_OUT:
        return kwargs["out"]
    if func is aten._pin_memory.default:
        return aten.alias(args[0])
    if func is aten.is_pinned.default:
        return False
    return run_on_fakes(func, args, kwargs)


@functools.cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Says whether an operator is made of others; inside of custom operators they come in one piece."""
    whole = func._schema.name.removeprefix("aten::") in WHOLE_ON_CUDA
    return not whole and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
