"""Tells where tensors are when torch is told of a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trl_fast.planning.roofline.known_values import values_of

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)


def is_on_gpu(tensor: Any) -> bool:
    """Says whether this is a fake tensor on the GPU."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def listed(tensor: FakeTensor) -> list | int | float:
    """Serves as `tolist`: one copy to the host of a tensor whose values are known.

    Raises:
        ValueError: they are not.
    """
    values = values_of(tensor.cpu())
    if values is None:
        raise ValueError(f"tolist of {tensor}: its values depend on what the model computes, and are not known")
    return values.tolist()


class Devices(TorchFunctionMode):
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
            if func is F.scaled_dot_product_attention and is_on_gpu(args[0]):
                func = _sdpa_on_cuda
            return func(*args, **kwargs)
        finally:
            self.host = before

    @staticmethod
    def _wants_host(func: Callable, args: tuple, kwargs: dict) -> bool:
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return func is torch.Tensor.cpu or func is torch.Tensor.to and CPU in leaves
        return func not in _BACKWARD


def _sdpa_on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Returns torch's kernel on a GPU for 16-bit numbers: flash attention, or with a mask the efficient one."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    with_lse = query.requires_grad
    given = (query, key, value, attn_mask, with_lse, dropout_p, is_causal)
    return aten._scaled_dot_product_efficient_attention(*given, scale=scale)[0]


def _indexed(device: str | int | torch.device) -> torch.device:
    """Returns a device as fake tensors have it: the GPU with its index."""
    return CPU if str(device) == "cpu" else torch.device(device) if str(device) == "meta" else CUDA


def _device_of(tensor: torch.Tensor) -> torch.device:
    return CUDA if is_on_gpu(tensor) else CPU


def _dtype(args: tuple, kwargs: dict) -> torch.dtype | None:
    """Returns the dtype that a call of `.to` asks for."""
    return next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)), None)


def _without_device(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Returns the arguments of a `.to` to where the tensor is."""
    rest = tuple(value for value in args if not isinstance(value, torch.device))
    return rest, {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
