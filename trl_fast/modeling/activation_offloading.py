"""Offloads activations: what layers save for backward waits in pinned memory of the CPU."""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_fast.ops.device import device_facts, has_gpu
from trl_fast.parallel.partitions import whole_shape

from .loading import backbone
from .model_changes import changes_of, unbound_forward
from .offload_schedule import SavedTensor, Schedule
from .pinned_copies import copies_of

logger = logging.getLogger(__name__)

OFFLOADING = "activation offloading"
# Smaller tensors are not worth a copy, in bytes.
_MIN_BYTES = 1024


def offload_activations(model: PreTrainedModel) -> None:
    """Lets whatever a model's layers save for backward be kept in pinned CPU memory; the head's and the loss's stay.

    On a machine without a GPU this does nothing, and says so.
    """
    if not has_gpu():
        logger.warning("activation_offloading=True does nothing here: without a GPU, activations are in CPU memory.")
        return
    changes = changes_of(model)
    if OFFLOADING in changes:
        return
    layers = backbone(model)
    change = changes.get_or_add(OFFLOADING, "what the layers save for backward waits in the CPU's memory")
    change.set(layers, "forward_kept", unbound_forward(layers))
    change.set(layers, "forward", types.MethodType(_forward_with_offloading, layers))
    for module in layers.modules():
        if isinstance(module, GradientCheckpointingLayer):
            change.add_hook(module.register_forward_pre_hook(_start_layer))


def _forward_with_offloading(self: Any, *args: object, **kwargs: object) -> object:
    with Offloading(self.parameters()).running():
        return self.forward_kept(self, *args, **kwargs)


class _Thread(threading.local):
    """Holds the forward pass at work, whose layers are told apart; None while backward computes layers again."""

    offloading: Offloading | None = None


_thread = _Thread()


def _start_layer(*_: object) -> None:
    if _thread.offloading is not None:
        _thread.offloading.start_layer()


class Offloading:
    """Offloads the saved tensors of one forward pass; they come back when backward asks for them.

    Weights are never copied, nor what autocast makes of them, which is told by its shape.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        weights = list(weights)
        # By the storages' own addresses, which fake tensors have too.
        self._storages = {weight.untyped_storage()._cdata for weight in weights}
        self._shapes = {tuple(sorted(whole_shape(weight))) for weight in weights}
        self._schedules: dict[torch.device, Schedule] = {}
        self._in_layers = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Offloads what autograd saves within the context."""
        before, _thread.offloading = _thread.offloading, self
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            _thread.offloading = before
            for schedule in self._schedules.values():
                schedule.end()

    def start_layer(self) -> None:
        """Starts a layer: what is saved from now on is its own."""
        self._in_layers = True
        for schedule in self._schedules.values():
            schedule.start_layer()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedTensor:
        if not self._is_worth_it(tensor):
            return tensor
        return self._schedule(tensor.device).save(tensor)

    def _schedule(self, device: torch.device) -> Schedule:
        if device not in self._schedules:
            self._schedules[device] = Schedule((device_facts(device).pinned_copies or copies_of)(device))
            if self._in_layers:
                self._schedules[device].start_layer()
        return self._schedules[device]

    def _is_worth_it(self, tensor: torch.Tensor) -> bool:
        if not is_on_device(tensor) or tensor.nbytes < _MIN_BYTES:
            return False
        storage = tensor.untyped_storage()
        # A tensor larger than its memory repeats it; a copy would not.
        repeats = storage.nbytes() < tensor.nbytes
        return not (repeats or storage._cdata in self._storages or tuple(sorted(tensor.shape)) in self._shapes)


def _unpack(packed: torch.Tensor | SavedTensor) -> torch.Tensor:
    return packed if isinstance(packed, torch.Tensor) else packed.restored()


def is_on_device(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor (any shape) is in the memory of a GPU, where memory is short."""
    holds = device_facts(tensor.device).holds
    return tensor.is_cuda if holds is None else holds(tensor)
