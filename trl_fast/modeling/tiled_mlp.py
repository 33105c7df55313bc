"""Runs MLPs and norms in tiles of tokens, forward and backward: their activations do not grow with length.

Both act on each token alone. An MLP's intermediates, several times as wide as the hidden states, are most of what a
layer keeps for backward; then come a norm's, float32 copies of the hidden states, two in forward and five more in
backward. Here backward computes each tile once more (TiledMLP of ALST, arXiv 2506.13996).

Tiles are cut by the module's class, not by its forward: Liger and the hub's kernels replace the forward of an instance
when training starts and whenever its mode changes, and then serve the tiles.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_fast.ops.device import some_tiles
from trl_fast.ops.named_gradients import first_derivative
from trl_fast.parallel.partitions import is_partitioned

from .loading import backbone
from .memory_budgets import TILED_LAYERS
from .model_changes import changes_of, replaced_forward
from .selective_checkpointing import nothing_saved

logger = logging.getLogger(__name__)

_Call = Callable[[torch.Tensor], torch.Tensor]

# Names of a decoder layer's MLP.
_MLP_NAMES = ("mlp", "feed_forward")
# What a mixture of experts holds; it routes all tokens of a batch together.
_EXPERT_NAMES = {"experts", "router", "gate"}


def tile_mlps(model: PreTrainedModel, tile_tokens: int) -> int:
    """Lets the MLPs of a model's layers, and the norms of its hidden states, run in tiles of so many tokens.

    Mixtures of experts are left as they are. Gradients are those of the whole module; weights' gradients accumulate
    over the tiles in float32. Adapters may be put on before or after. Returns how many MLPs run in tiles.

    Raises:
        ValueError: there is no MLP that can be tiled.
    """
    found = list(_mlps(model))
    tiled = [mlp for mlp in found if _acts_on_single_tokens(mlp)]
    if not tiled:
        raise ValueError(
            f"tiled_mlp={tile_tokens}: {type(model).__name__} has no MLP that can be tiled (a module "
            f"{' or '.join(map(repr, _MLP_NAMES))} of its layers that is no mixture of experts); leave tiled_mlp unset"
        )
    if len(tiled) < len(found):
        logger.warning(
            f"tiled_mlp: {len(found) - len(tiled)} of {len(found)} MLPs are mixtures of experts: not tiled."
        )
    change = changes_of(model).get_or_add(TILED_LAYERS, "MLPs and norms run in tiles of tokens")
    for module in (*tiled, *_norms(model)):
        if isinstance(module, Tiled):
            module.tile_tokens = tile_tokens
        else:
            change.set(module, "tile_tokens", tile_tokens, fixed=False)
            change.set_class(module, _tiled_class(cast("Any", type(module))))
            # For ZeRO-3: what is in the module is gathered with it, at once, and not by hooks of its parts.
            change.set(module, "_z3_leaf", True)
    return len(tiled)


class Tiled(torch.nn.Module):
    """Stands before the class of a module that acts on single tokens, and calls it with a tile at a time."""

    tile_tokens: int

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[:-1].numel() <= self.tile_tokens:
            return self.call_whole(hidden_states)
        if isinstance(self, FSDPModule) or any(map(is_partitioned, self.parameters())):
            # An engine's hooks gather and free once a call, so they go around all tiles.
            module = self.forward
            with replaced_forward(self, lambda hidden: _run_tiles(self, module, hidden)):
                return self.call_whole(hidden_states)
        return _run_tiles(self, self.call_whole, hidden_states)

    def call_whole(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Calls the module itself, hooks and forward, on hidden states (..., H) of any float dtype."""
        return super().__call__(hidden_states)


@functools.cache
def _tiled_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Returns a class that runs in tiles, under its name: transformers, PEFT and `print` tell modules by it."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Tiled, cls), named)


def _layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def _mlps(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for layer in _layers(model):
        yield from (child for name, child in layer.named_children() if name in _MLP_NAMES)


def _norms(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yields the norms of hidden states, in the layers and after them; those within attention are small."""
    for owner in (*_layers(model), backbone(model)):
        yield from (
            child for child in owner.children() if type(child).__name__.endswith("Norm") and _takes_one_tensor(child)
        )


def _acts_on_single_tokens(mlp: torch.nn.Module) -> bool:
    return not _EXPERT_NAMES & {name for name, _ in mlp.named_children()} and _takes_one_tensor(mlp)


def _takes_one_tensor(module: torch.nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


@torch.compiler.disable
def _run_tiles(self: Tiled, call: _Call, hidden_states: torch.Tensor) -> torch.Tensor:
    """Runs a module in tiles of its hidden states (..., H); call: with or without the module's hooks.

    Not compiled: a backward that computes its module once more is nothing that torch.compile can follow.
    """
    weights = [weight for weight in self.parameters() if weight.requires_grad]
    tiles = _Tiles(call, self.tile_tokens)
    out = _InTiles.apply(tiles, hidden_states.reshape(1, -1, hidden_states.shape[-1]), *weights)
    return out.view(*hidden_states.shape[:-1], out.shape[-1])


@dataclass(frozen=True)
class _Tiles:
    """Holds what a tile is given to, and how many tokens it has."""

    call: _Call
    tokens: int

    def of(self, hidden: torch.Tensor) -> Iterator[slice]:
        """Gives the tiles of hidden states (1, T, H)."""
        first_tokens = range(0, hidden.shape[1], self.tokens)
        return some_tiles((slice(start, start + self.tokens) for start in first_tokens), hidden.device)


class _InTiles(torch.autograd.Function):
    """Saves the input alone. hidden: (1, T, H); weights: the parameters of the module that train."""

    @staticmethod
    def forward(ctx: Any, tiles: _Tiles, hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.tiles, ctx.weights, ctx.state = tiles, weights, _State(hidden.device)
        out: Any = None
        with nothing_saved():
            for rows in tiles.of(hidden):
                tile = tiles.call(hidden[:, rows])
                out = tile.new_empty(*hidden.shape[:2], tile.shape[-1]) if out is None else out
                out[:, rows] = tile
        return out

    @staticmethod
    @first_derivative("tiled_mlp")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        tiles, weights, with_hidden = ctx.tiles, ctx.weights, ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if with_hidden else None
        sums: list[torch.Tensor | None] = [None] * len(weights)
        with ctx.state.restored():
            for rows in tiles.of(hidden):
                tile = hidden[:, rows].detach().requires_grad_(with_hidden)
                with torch.enable_grad():
                    out = tiles.call(tile)
                leaves = (tile, *weights) if with_hidden else weights
                found = list(torch.autograd.grad(out, leaves, grad[:, rows], allow_unused=True))
                if grad_hidden is not None:
                    grad_hidden[:, rows] = found.pop(0)
                sums = [_add(total, part) for total, part in zip(sums, found, strict=True)]
        in_dtype = [None if total is None else total.to(w.dtype) for total, w in zip(sums, weights, strict=True)]
        return None, grad_hidden, *in_dtype


def _add(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the sum, in float32 at least, in the memory of `total`."""
    if part is None:
        return total
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)


class _State:
    """Saves what a recomputation must find again: the state of autocast, and random numbers of dropout."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        kind = device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.random = torch.get_rng_state()
        self.random_on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        kind, dtype, enabled = self.autocast
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(kind, dtype, enabled))
            stack.enter_context(torch.random.fork_rng([] if self.random_on_device is None else [self.device]))
            torch.set_rng_state(self.random)
            if self.random_on_device is not None:
                torch.cuda.set_rng_state(self.random_on_device, self.device)
            yield
