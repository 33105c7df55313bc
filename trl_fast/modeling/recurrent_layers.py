"""Runs layers that carry a state from token to token (linear attention, short convolutions, Mamba) on rows of trees.

A layer's own forward is called with batches of segments (segment_runs.py), and with a cache in which it finds the
states behind the segments that they continue. It is the cache interface by which transformers generates text, so the
mathematics of a layer and its kernels stay its own; here states keep their graph, and nothing is changed in place.
"""

from __future__ import annotations

import functools
import logging
import types
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from trl_fast.data.segments import TreeLengths
from trl_fast.parallel.engines import original_class

from .layer_kernels import CONVOLUTION, DELTA_RULE, KIMI_DELTA_RULE, LAYER_KERNELS, MAMBA1, MAMBA2, LayerKernel
from .model_changes import Change, replaced_forward, unbound_forward
from .segment_runs import RunBatch, States, row_runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecurrentLayer:
    """Describes a class of layers that carry a state.

    - `cache`: the keyword by which its forward takes a cache.
    - `masks_convolved`: whether its forward masks pads once more behind its convolution, and so undoes the bias there.
    - `goes_on`: whether its forward goes on from a state with more than one token.
    - `gets_keywords`: whether the decoder layer around it hands on the keywords that it does not know.
    - `kernels`: those of other packages that transformers takes for it where they are installed.
    """

    kernels: tuple[LayerKernel, ...]
    cache: str = "cache_params"
    masks_convolved: bool = False
    goes_on: bool = True
    gets_keywords: bool = True


_DELTA_RULE = RecurrentLayer((DELTA_RULE, CONVOLUTION))
_KIMI_DELTA_RULE = RecurrentLayer((KIMI_DELTA_RULE, CONVOLUTION))
_MAMBA2 = RecurrentLayer((MAMBA2, CONVOLUTION), masks_convolved=True)
_MAMBA1 = RecurrentLayer((MAMBA1, CONVOLUTION), goes_on=False)
# In transformers 5.17 its decoder layer keeps keywords to itself.
_SHORT_CONVOLUTION = RecurrentLayer((CONVOLUTION,), cache="past_key_values", gets_keywords=False)
# By the name of the class in transformers. A family is added by a line here; tests compare it with padded sequences.
RECURRENT_LAYERS = {
    "Qwen3NextGatedDeltaNet": _DELTA_RULE,
    "Qwen3_5GatedDeltaNet": _DELTA_RULE,
    "Qwen3_5MoeGatedDeltaNet": _DELTA_RULE,
    "OlmoHybridGatedDeltaNet": _DELTA_RULE,
    "KimiLinearDeltaAttention": _KIMI_DELTA_RULE,
    "BailingHybridDeltaAttention": _KIMI_DELTA_RULE,
    "Lfm2ShortConv": _SHORT_CONVOLUTION,
    "Lfm2MoeShortConv": _SHORT_CONVOLUTION,
    "Lfm3ShortConv": _SHORT_CONVOLUTION,
    "BambaMixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "ZambaMambaMixer": _MAMBA1,
    "JambaMambaMixer": replace(_MAMBA1, gets_keywords=False),
    "Mamba2Mixer": _MAMBA2,
}
# How the projections in front of a convolution, and the convolution, are called.
_PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")
_CONVOLUTION = "conv"
# The modules whose weights kernels of Mamba 2 read themselves.
_READ_BY_MAMBA2 = ("out_proj", "conv1d")


class SegmentStates:
    """Holds the states of one layer for the rows of a batch, with their graph, as transformers' `Cache` is asked.

    `conv_states`, `recurrent_states`: from a state's index (most layers have the one, 0) to a tensor of B rows.
    """

    record_past = False

    def __init__(self, conv_states: dict[int, torch.Tensor], recurrent_states: dict[int, torch.Tensor]) -> None:
        self.conv_states, self.recurrent_states = conv_states, recurrent_states

    @property
    def layers(self) -> Mapping[int, SegmentStates]:
        """Returns these states, whichever layer asks: transformers 5.17 reads them so."""
        return defaultdict(lambda: self)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Returns whether tokens came before."""
        return bool(self.conv_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Returns that no token is going to be taken back."""
        return self.record_past

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Returns a convolution's last inputs (B, channels, width), None before the first token."""
        return self.conv_states.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Returns a recurrent state (B, ...), None before the first token."""
        return self.recurrent_states.get(state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Keeps the last of a convolution's inputs (B, channels, L); returns them all, with those from before."""
        before = self.conv_states.get(state_idx)
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        width = conv_kernel_size or conv_states.shape[-1]
        # A negative number of pads cuts off.
        self.conv_states[state_idx] = F.pad(inputs, (width - inputs.shape[-1], 0))
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        """Keeps a recurrent state (B, ...)."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def joined(self, others: SegmentStates) -> SegmentStates:
        """Returns the rows of both."""
        return SegmentStates(
            _joined(self.conv_states, others.conv_states), _joined(self.recurrent_states, others.recurrent_states)
        )

    def rows(self, numbers: torch.Tensor) -> SegmentStates:
        """Returns rows, by number (B,) int64; one may be asked for several times."""
        conv, recurrent = (
            {index: state.index_select(0, numbers) for index, state in states.items()}
            for states in (self.conv_states, self.recurrent_states)
        )
        return SegmentStates(conv, recurrent)


def _joined(first: dict[int, torch.Tensor], others: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    if not first:
        return others
    return {index: torch.cat([state, others[index]]) for index, state in first.items()}


def recurrent_layers_of(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Returns the layers of a model that carry a state and whose class is known here, by their name in the model."""
    return {name: module for name, module in model.named_modules() if _class_name(module) in RECURRENT_LAYERS}


def warn_of_missing_kernels(model: PreTrainedModel) -> None:
    """Logs which layers of a model run on transformers' PyTorch code, for want of which kernels, and why."""
    kernels = {kernel for layer in recurrent_layers_of(model).values() for kernel in _described(layer).kernels}
    missing = [(kernel, *kernel.fitness()) for kernel in LAYER_KERNELS if kernel in kernels]
    reasons = [f"{kernel.serves} ({reason})" for kernel, serves, reason in missing if not serves]
    if reasons:
        logger.warning(
            f"{type(model).__name__} computes in transformers' PyTorch code, not in kernels: {'; '.join(reasons)}."
        )


def warn_of_unread_adapters(model: PreTrainedModel) -> None:
    """Logs which adapters have no effect, since installed kernels read the weights below them."""
    if not MAMBA2.fitness()[0]:
        return
    unread = {
        f"{_class_name(layer)}.{name}"
        for layer in recurrent_layers_of(model).values()
        if MAMBA2 in _described(layer).kernels
        for name in _READ_BY_MAMBA2
        if isinstance(getattr(layer, name, None), BaseTunerLayer)
    }
    if unread:
        logger.warning(
            f"Adapters of {', '.join(sorted(unread))} have no effect in training: mamba-ssm reads the weights "
            f"below them; add exclude_modules={list(_READ_BY_MAMBA2)} to the peft_config."
        )


def _described(layer: torch.nn.Module) -> RecurrentLayer:
    return RECURRENT_LAYERS[_class_name(layer)]


def _class_name(module: torch.nn.Module) -> str:
    return original_class(module).__name__


def use_recurrent_segments(model: PreTrainedModel, change: Change) -> None:
    """Lets the layers of a model that carry a state run on rows of trees; without tree lengths they run as before.

    change: the change of the model on whose list this goes; it is undone with the rest of it.
    """
    for layer in recurrent_layers_of(model).values():
        change.set(layer, "forward_whole", unbound_forward(layer))
        change.set(layer, "forward", types.MethodType(_forward, layer))
    # Layers of one class stay of one class: engines tell by it what they wrap.
    silent = {
        type(module) for module in model.modules() if any(not _described(c).gets_keywords for c in _children(module))
    }
    for module in model.modules():
        if type(module) in silent:
            change.set_class(module, _handing_on(cast("Any", type(module))))


def _children(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for child in module.children() if _class_name(child) in RECURRENT_LAYERS]


class HandsLengthsOn(torch.nn.Module):
    """Stands before the class of a decoder layer that keeps the trees' lengths to itself.

    It is a class, since activation checkpointing computes a layer again by the forward of its class.
    """

    def forward(self, *args: Any, tree_lengths: tuple[TreeLengths, ...] | None = None, **kwargs: Any) -> Any:
        """Computes the layer; its recurrent layers get the lengths."""
        if tree_lengths is None:
            return super().forward(*args, **kwargs)
        with ExitStack() as stack:
            for layer in _children(self):
                given = functools.partial(layer.forward, tree_lengths=tree_lengths)
                stack.enter_context(replaced_forward(layer, given))
            return super().forward(*args, tree_lengths=tree_lengths, **kwargs)


@functools.cache
def _handing_on(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Returns a class that hands the lengths on, under its name: transformers and engines tell modules by it."""
    return type(cls.__name__, (HandsLengthsOn, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    *args: Any,
    tree_lengths: tuple[TreeLengths, ...] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Computes a layer on hidden states (1, T, H): in segments where tree lengths come, else as its class does."""
    if tree_lengths is None:
        return self.forward_whole(self, hidden_states, *args, **kwargs)
    return _run_segments(self, hidden_states, tree_lengths)


@torch.compiler.disable
def _run_segments(self: Any, hidden_states: torch.Tensor, tree_lengths: tuple[TreeLengths, ...]) -> torch.Tensor:
    """Computes a layer on hidden states (1, T, H), batch by batch of segments.

    Not compiled: the batches are others in every row.
    """
    described = _described(self)
    runs = row_runs(tree_lengths, hidden_states.device, _states_of(self, described))
    tokens = hidden_states.squeeze(0)
    states, outputs = SegmentStates({}, {}), []
    for batch in runs.batches:
        cache = _first_states(batch, states)
        given = {described.cache: cache, "attention_mask": batch.mask}
        inputs = tokens.index_select(0, batch.tokens).unflatten(0, batch.shape)
        outputs.append(self.forward_whole(self, inputs, **given).flatten(0, 1))
        if cache is not None and batch.keeps_states:
            states = states.joined(cache)
    return torch.cat(outputs).index_select(0, runs.places).unsqueeze(0)


def _states_of(layer: torch.nn.Module, described: RecurrentLayer) -> States:
    """Returns how a layer comes to its states: pads are zeros, which become others where a bias is added to them."""
    if not described.goes_on:
        return States.NONE
    names = _PROJECTIONS if described.masks_convolved else (*_PROJECTIONS, _CONVOLUTION)
    pads_write = any(
        name.startswith(names) and parameter.endswith("bias")
        for name, child in layer.named_children()
        for parameter, _ in child.named_parameters()
    )
    return States.CUT if pads_write else States.PADDED_LEFT


def _first_states(batch: RunBatch, states: SegmentStates) -> SegmentStates | None:
    """Returns the cache of a batch; None where no states come in and none are kept."""
    if batch.parents is not None:
        return states.rows(batch.parents)
    return SegmentStates({}, {}) if batch.keeps_states else None
