"""Makes classes of linear layers, embeddings and LoRA layers: those of PyTorch, transformers and PEFT themselves.

Linear layers multiply by kernels of our own where those are faster, LoRA layers sum the adapter's product into the
layer's, and embeddings write each row of their gradient once. Subclasses stay as they are, such as layers of 4 and 8
bits. What a call brings that the ops do not take, such as autocast or single tokens, runs as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_fast.modeling.tied_weight import HEAD_WEIGHT
from trl_fast.ops.device import device_facts
from trl_fast.ops.layers import embedding, lora_linear, tied_embedding
from trl_fast.ops.linear import MIN_ROWS, linear
from trl_fast.parallel.partitions import is_partitioned

from .fused_classes import make_class
from .kernels import kernel_for
from .lora_layers import served_adapter


def plain_class_for(module: nn.Module, device: torch.device) -> type[nn.Module] | None:
    """Returns a class for a linear layer, an embedding or a LoRA layer that computes faster; None if there is none."""
    kind = None if "forward" in vars(module) else _KINDS.get(type(module))
    return None if kind is None else kind.find(module, device)


def plain_kind(module: nn.Module) -> str:
    """Returns what a module with such a class is called."""
    return _KINDS[type(module)].name


def _find_linear(module: Any, device: torch.device) -> type[nn.Module] | None:
    if not device_facts(device).own_products or module.weight.dtype != torch.float32:
        return None
    cls = cast("Any", type(module))
    # The transpose of a weight in parts, kept for backward, would be empty by then.
    return None if cls is Conv1D and is_partitioned(module.weight) else _linear_class(cls)


def _find_embedding(module: Any, device: torch.device) -> type[nn.Module] | None:
    does_more = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    return None if does_more or not kernel_for("embedding", device, module.weight.dtype).ok else _embedding_class()


def _find_lora(_module: Any, _device: torch.device) -> type[nn.Module] | None:
    return _lora_class()


class _Kind(NamedTuple):
    """Holds what a kind of modules is called, and what finds a class for one of them on a device."""

    name: str
    find: Callable[[Any, torch.device], type[nn.Module] | None]


_KINDS: dict[type, _Kind] = {
    nn.Linear: _Kind("linear layer", _find_linear),
    Conv1D: _Kind("linear layer", _find_linear),
    nn.Embedding: _Kind("embedding", _find_embedding),
    LoraLinear: _Kind("LoRA layer", _find_lora),
}


@functools.cache
def _linear_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not _is_ours(x, self.weight):
            return cls.forward(self, x)
        return linear(x, self.weight.t() if cls is Conv1D else self.weight, self.bias)

    return make_class(cls, forward=forward)


def _is_ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tells whether the product of x (..., H) and a weight is one that our kernels are for."""
    one_dtype = x.dtype == weight.dtype == torch.float32 and x.device == weight.device
    return one_dtype and x.numel() >= MIN_ROWS * x.shape[-1] and not torch.is_autocast_enabled(x.device.type)


@functools.cache
def _embedding_class() -> type[nn.Module]:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if not self.weight.requires_grad or input.device != self.weight.device:
            return nn.Embedding.forward(self, input)
        if HEAD_WEIGHT not in vars(self) or torch.compiler.is_compiling():
            return embedding(input, self.weight, self.padding_idx)
        rows, vars(self)[HEAD_WEIGHT] = tied_embedding(input, self.weight, self.padding_idx)
        return rows

    made: Any = make_class(nn.Embedding, forward=forward)
    made.hands_weight_on = True
    return made


@functools.cache
def _lora_class() -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or kwargs else served_adapter(self, x)
        if adapter is None:
            return LoraLinear.forward(self, x, *args, **kwargs)
        return lora_linear(x, self.base_layer.weight, self.base_layer.bias, *adapter)

    return make_class(LoraLinear, forward=forward)
