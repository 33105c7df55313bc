"""Activations that wait for backward wait in the CPU's memory."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from .loading import backbone, unbound_forward

logger = logging.getLogger(__name__)

# Smaller tensors are not worth a copy, in bytes.
_MIN_BYTES = 1024
# torch rounds a block of pinned memory up to a power of two, which would nearly double some tensors. Blocks of one
# such size waste nothing but in the last one, and serve tensors of any length again.
_BLOCK_BYTES = 1 << 26


def offload_activations(model: PreTrainedModel) -> None:
    """Lets whatever a model's layers save for backward be kept in pinned CPU memory; the head's and the loss's stay.

    On a machine without a GPU this does nothing, and says so.
    """
    if not torch.cuda.is_available():
        logger.warning("activation_offloading=True does nothing here: without a GPU, activations are in CPU memory.")
        return
    layers = backbone(model)
    if hasattr(layers, "forward_kept"):
        return
    layers.forward_kept = unbound_forward(layers)
    layers.forward = types.MethodType(_forward_with_offloading, layers)


def _forward_with_offloading(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
    with Offloading(self.parameters()):
        return self.forward_kept(self, *args, **kwargs)


@dataclass(frozen=True)
class HostCopy:
    """A tensor's elements in the order of its memory, in blocks; the shape in that order, and the way back from it."""

    blocks: list[torch.Tensor]
    shape: torch.Size
    inverse: tuple[int, ...]


class Offloading(saved_tensors_hooks):
    """Within, tensors on a GPU that autograd saves are copied to the CPU, and back when backward asks for them.

    The copies are queued on the stream that computes, so what they free is free for what is queued next, and the host
    waits for none of them. Weights are never copied, nor what autocast makes of them, which is told by its shape.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        weights = list(weights)
        # By the storages' own addresses, which fake tensors have too.
        self._storages = {weight.untyped_storage()._cdata for weight in weights}
        self._shapes = {tuple(sorted(weight.shape)) for weight in weights}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, HostCopy]:
        return (tensor.device, self.to_host(tensor)) if self._is_worth_it(tensor) else tensor

    def _unpack(self, packed: torch.Tensor | tuple[torch.device, HostCopy]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else self.to_device(packed[1], packed[0])

    def _is_worth_it(self, tensor: torch.Tensor) -> bool:
        if not self.is_on_device(tensor) or tensor.nbytes < _MIN_BYTES:
            return False
        storage = tensor.untyped_storage()
        # A tensor larger than its memory repeats it; a copy would not.
        repeats = storage.nbytes() < tensor.nbytes
        return not (repeats or storage._cdata in self._storages or tuple(sorted(tensor.shape)) in self._shapes)

    @staticmethod
    def is_on_device(tensor: torch.Tensor) -> bool:
        """Whether a tensor is where memory is short."""
        return tensor.is_cuda

    @staticmethod
    def to_host(tensor: torch.Tensor) -> HostCopy:
        """A copy in pinned CPU memory, on its way."""
        # In the order of its memory a tensor without gaps is one run of elements, which needs no copy on the device.
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        ordered = tensor.permute(order)
        parts = ordered.reshape(-1).split(_BLOCK_BYTES // tensor.element_size())
        blocks = [pinned_memory(len(part), part.dtype).copy_(part, non_blocking=True) for part in parts]
        inverse = tuple(sorted(range(tensor.dim()), key=order.__getitem__))
        return HostCopy(blocks, ordered.shape, inverse)

    @staticmethod
    def to_device(copy: HostCopy, device: torch.device) -> torch.Tensor:
        """The copy's copy on the device, in the same strides, on its way."""
        flat = torch.empty(copy.shape.numel(), dtype=copy.blocks[0].dtype, device=device)
        for part, block in zip(flat.split(len(copy.blocks[0])), copy.blocks, strict=True):
            part.copy_(block, non_blocking=True)
        return flat.view(copy.shape).permute(copy.inverse)


def pinned_memory(count: int, dtype: torch.dtype) -> torch.Tensor:
    """(count,) elements that a GPU can copy to and from without the host's help."""
    return torch.empty(count, dtype=dtype, pin_memory=True)
