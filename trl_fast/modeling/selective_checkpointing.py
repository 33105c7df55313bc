"""Checkpoints activations selectively: keeps the dearest results instead of computing them again.

Checkpointing keeps a layer's input and computes all the rest once more in backward. Most of the time of that goes into
matrix products and attention, whose results are a part of what a layer would save without checkpointing. They are kept
here, as many as a limit allows; values and gradients are the same, bit for bit.

On a GPU whole layers go first, as many as its free memory holds (uncheckpointed_layers.py): dispatch modes look at
every operator twice, and a small model then waits for its host. They serve what is left of the memory, if layers are
large.

torch's selective checkpointing (create_selective_checkpoint_contexts) does this without a limit. It also stops where a
result is changed in place, and where a cast of a weight comes out of autocast's cache the one time and not the other.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_fast.data.layer_sizes import experts_per_token

from .liger_kernels import turn_copies
from .loading import backbone, reads_more_than_text, whole_backbone
from .memory_budgets import default_activation_budget
from .model_changes import changes_of
from .uncheckpointed_layers import (
    LARGE_LAYER,
    Footprint,
    Meter,
    PassSize,
    device_memory,
    merged,
    missing_gradient_bytes,
    split_layers,
    working_weights,
)

logger = logging.getLogger(__name__)

SELECTIVE_CHECKPOINTING = "selective checkpointing"
PRODUCT, ATTENTION = "product", "attention"
# Not all of them exist in every build of torch.
_PRODUCT_OPS = ("mm", "addmm", "_grouped_mm")
# Of other libraries, registered once they are imported; bitsandbytes' are those of weights of 4 and 8 bits.
_OTHER_PRODUCTS = (
    "trl_fast::linear",
    "trl_fast::lora_linear",
    "trl_fast::lora_product",
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::int8_scaled_mm",
    "bitsandbytes::int8_mixed_scaled_mm",
)
_ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
_OTHER_ATTENTION = ("trl_fast::row_attention",)


def set_selective_checkpointing(
    model: PreTrainedModel, limit: int | None, *, attention_always: bool = False, whole_layers: bool = True
) -> None:
    """Lets gradient checkpointing of a model, once it is enabled, keep up to `limit` bytes more in a forward pass.

    On a GPU whole layers and, of large ones, results; None: as far as its free memory goes. Elsewhere results; None:
    `default_activation_budget`. attention_always: results of attention are kept whatever the limit, as TRL's
    `selective` does. whole_layers: False where what layers save leaves the GPU. Reentrant checkpointing, a compiled
    model and one whose code takes no function that checkpoints compute all again, as without this.
    """
    if SELECTIVE_CHECKPOINTING not in changes_of(model):
        if "gradient_checkpointing_func" not in inspect.signature(model._set_gradient_checkpointing).parameters:
            return
        _change_checkpointing(model)
    selective: Any = model.trl_fast_selective_checkpointing
    selective.limit, selective.attention_always, selective.whole_layers = limit, attention_always, whole_layers


def _change_checkpointing(model: PreTrainedModel) -> None:
    change = changes_of(model).get_or_add(
        SELECTIVE_CHECKPOINTING, "gradient checkpointing keeps results and leaves layers out"
    )
    selective = SelectiveCheckpointing(model)
    change.on_undo(_checkpoint_everything, model)
    change.set(model, "trl_fast_selective_checkpointing", selective)
    if reads_more_than_text(model):
        change.add_hook(whole_backbone(model).register_forward_pre_hook(selective.start_reading))
    change.add_hook(backbone(model).register_forward_pre_hook(selective.start))
    method: Any = model._set_gradient_checkpointing
    change.set(model, "plain_set_gradient_checkpointing", method.__func__)
    change.set(model, "_set_gradient_checkpointing", types.MethodType(_set_gradient_checkpointing, model))


def _checkpoint_everything(model: PreTrainedModel) -> None:
    """Gives layers whose checkpointing is on the function that transformers gave them."""
    modules: list[Any] = [*model.modules()]
    for module in modules:
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        run = getattr(function, "func", None)
        if getattr(run, "__func__", None) is SelectiveCheckpointing.run:
            module._gradient_checkpointing_func = function.args[0]


def _set_gradient_checkpointing(
    self: Any, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
) -> None:
    """Gives each layer a function that checkpoints selectively, in the place of transformers' method."""
    self.trl_fast_selective_checkpointing.forget()
    keywords = dict(getattr(gradient_checkpointing_func, "keywords", {}))
    before = dict(keywords)
    if keywords.pop("selective", None) is not None:
        # TRL's key, which the config has read; torch does not know it.
        keywords.setdefault("use_reentrant", False)
    if keywords.get("use_reentrant") and _shares_keys(self):
        keywords["use_reentrant"] = False
    if keywords != before:
        gradient_checkpointing_func = functools.partial(gradient_checkpointing_func.func, **keywords)
    if keywords.get("use_reentrant") is False:
        # transformers' own way to offload wraps torch's function: layers that it does not see would not be offloaded.
        self.trl_fast_selective_checkpointing.is_torch_checkpoint = gradient_checkpointing_func.func is checkpoint
        gradient_checkpointing_func = functools.partial(
            self.trl_fast_selective_checkpointing.run, gradient_checkpointing_func
        )
    self.plain_set_gradient_checkpointing(self, enable, gradient_checkpointing_func, **kwargs)


def _shares_keys(model: PreTrainedModel) -> bool:
    """Returns whether later layers read keys and values of earlier ones (Gemma 3n, Gemma 4), and logs what follows.

    Reentrant checkpointing records no gradients in forward: what later layers ask of those keys would be lost.
    """
    shares = bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))
    if shares:
        logger.warning(
            "gradient_checkpointing_kwargs: use_reentrant=True becomes False, since layers of "
            f"{type(model).__name__} share keys and values, which would lack a part of their gradient."
        )
    return shares


class _Thread(threading.local):
    keeps = True


_thread = _Thread()


@contextmanager
def nothing_saved() -> Iterator[None]:
    """Keeps no results within the context: for a module that computes itself again in backward anyway."""
    before, _thread.keeps = _thread.keeps, False
    try:
        yield
    finally:
        _thread.keeps = before


class SelectiveCheckpointing:
    """Tells the layers of a model, pass by pass, whether to checkpoint, and what they may keep."""

    limit: int | None = 0
    # What a pass keeps where no limit is set and no layer is left out.
    default_limit = 0
    attention_always = False
    whole_layers = is_torch_checkpoint = True
    device_memory = staticmethod(device_memory)

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Of the forward pass at work: its budget, and the layers that it does not checkpoint.
        self.budget = Budget(0, 0)
        # What the pass before had left when this one began to read images.
        self._left_before = 0
        self.whole: frozenset[torch.nn.Module] = frozenset()
        self.forget()

    def forget(self) -> None:
        """Forgets the model's layers and what they take: others may be checkpointed from now on."""
        # Listed once: walking through a model with adapters takes milliseconds.
        self._every_layer: list[torch.nn.Module] | None = None
        self._weights: list[torch.nn.Parameter] = []
        # The layers that checkpoint, until the first of them has settled what the pass does.
        self._layers: list[torch.nn.Module] | None = None
        self._footprint: Footprint | None = None
        self._meter: Meter | None = None

    def start_reading(self, _module: torch.nn.Module, _args: object) -> None:
        """Starts a pass that may read images first, by layers that keep results in the room the pass before left."""
        self._left_before = self.budget.left

    def start(self, module: torch.nn.Module, _args: object) -> None:
        """Starts a forward pass of the model's backbone."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if self._every_layer is None:
            self._every_layer = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
            self._weights = list(self._model.parameters())
        # Here, since they may come after everything else: when training starts.
        turn_copies(self._model, SavingMode)
        self._layers = [layer for layer in self._every_layer if layer.gradient_checkpointing]

    def run(self, checkpoint_function: Callable, function: Callable, *args: Any) -> Any:
        """Runs a layer's forward, checkpointed or not."""
        if torch.compiler.is_compiling():
            return checkpoint_function(function, *args)
        if not torch.is_grad_enabled():
            return function(*args)
        if self._layers is not None:
            self._settle(self._layers, _hidden_states(function, args))
            self._layers = None
        layer = _layer_of(function)
        if layer in self.whole:
            return function(*args)
        if self._meter is not None:
            function = self._meter.watched(layer, function)
        if not (self.budget.left or self.attention_always):
            return checkpoint_function(function, *args)
        return checkpoint_function(function, *args, context_fn=self._contexts)

    def _settle(self, layers: list[torch.nn.Module], hidden: torch.Tensor) -> None:
        """Settles what a pass does, by the hidden states (B, T, H) that its first layer gets."""
        kept = max(0, self._left_before - self.budget.left)
        memory = self.device_memory(hidden.device) if self._may_leave_whole and layers else None
        if memory is None or _says_why_none_whole(layers):
            missing = missing_gradient_bytes(self._weights)
            self._meter, self.default_limit = None, default_activation_budget(self._model, hidden, missing)
            self._share(layers, 0, max(0, (self.default_limit if self.limit is None else self.limit) - kept))
            return
        if self._meter is not None and (found := self._meter.footprint()) is not None:
            self._footprint, self._meter = merged(self._footprint, found), None
        size, missing = PassSize.of(hidden), missing_gradient_bytes(self._weights)
        if self._footprint is None or not self._footprint.covers(size):
            self._meter = self._meter or Meter(layers, hidden.device, cast("Any", self.device_memory))
            self._meter.start(size, missing, memory)
            self._share(layers, 0, 0)
            return
        self._meter = None
        limit = None if self.limit is None else max(0, self.limit - kept)
        split = split_layers(self._footprint, size, memory, missing, limit)
        experts = experts_per_token(self._model.config.get_text_config()) or 1
        large = size.tokens * working_weights(layers[0], experts) >= LARGE_LAYER
        self._share(layers, split.whole, split.left if large else 0)

    @property
    def _may_leave_whole(self) -> bool:
        return self.whole_layers and self.is_torch_checkpoint and self.limit != 0

    def _share(self, layers: list[torch.nn.Module], whole: int, limit: int) -> None:
        checkpointed = len(layers) - whole
        self.whole = frozenset(layers[checkpointed:])
        self.budget = Budget(limit, checkpointed, self.attention_always)

    def _contexts(self) -> tuple[SavingMode, ReusingMode]:
        saving = SavingMode(self.budget)
        return saving, ReusingMode(saving.results)


def _layer_of(function: Callable) -> torch.nn.Module | None:
    """Returns the layer whose forward is given: bound by a partial, before transformers 5.20 by a method."""
    given = getattr(function, "args", ())
    return given[0] if given else getattr(getattr(function, "func", None), "__self__", None)


def _hidden_states(function: Callable, args: tuple) -> torch.Tensor:
    """Returns the first tensor that a layer's forward gets, its hidden states (B, T, H)."""
    return next(iter(_tensors((args, getattr(function, "keywords", {})))))


def _says_why_none_whole(layers: list[torch.nn.Module]) -> bool:
    """Returns whether layers cannot be chosen by one device's memory, and logs why."""
    weights = [next(layer.parameters(), None) for layer in layers]
    devices = {str(weight.device) for weight in weights if weight is not None}
    if len(devices) > 1:
        _say_once(f"the model lies on several devices ({', '.join(sorted(devices))})")
        return True
    if any(hasattr(weight, "ds_id") for weight in weights):
        _say_once("DeepSpeed ZeRO-3 gathers weights within layers, which all processes have to do alike")
        return True
    return False


@functools.cache
def _say_once(why: str) -> None:
    logger.warning(f"Gradient checkpointing leaves no whole layers uncheckpointed: {why}.")


class Budget:
    """Counts the bytes that one forward pass may still keep.

    Attention goes before products, since it is what grows faster than a row does: products get no room that the
    attention of the layers to come will need, by what that of the last layer took. Before the first, the result of a
    product stands for it; the first product of a layer makes the queries.

    asked: kind and bytes of all that was asked for, a list a layer.
    """

    def __init__(self, limit: int, layers: int, attention_always: bool = False) -> None:
        self.left = limit
        self.asked: list[list[tuple[str, int]]] = []
        self._layers = layers
        self._attention_always = attention_always
        self._attention: int | None = None

    def start_layer(self) -> None:
        """Starts the next layer."""
        if self.asked:
            self._attention = self._attention_of_layer
        self.asked.append([])

    @property
    def _attention_of_layer(self) -> int:
        return sum(size for kind, size in self.asked[-1] if kind == ATTENTION)

    def take(self, kind: str, size: int) -> bool:
        """Returns whether a result is to be kept; if so, its bytes are taken from the budget."""
        reserved = 0
        if kind == PRODUCT:
            self._attention = size if self._attention is None else self._attention
            layers_to_come = self._layers - len(self.asked) + 1
            reserved = max(0, layers_to_come * self._attention - self._attention_of_layer)
        self.asked[-1].append((kind, size))
        fits = size + reserved <= self.left or (kind == ATTENTION and self._attention_always)
        self.left -= size if fits else 0
        return fits

    def give_back(self, size: int) -> None:
        """Adds the bytes of a result to the budget again that was to be kept and is not."""
        self.left += size


@dataclass
class Result:
    """Holds the result of a matrix product or of attention; values is None if it was not kept, or has been used."""

    op: OpOverload
    kind: str
    values: Any = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return _tensors(self.values)


class SavingMode(TorchDispatchMode):
    """Keeps results during a layer's first forward, as the budget allows."""

    supports_higher_order_operators = True

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.results: list[Result] = []
        self._budget = budget

    def __enter__(self) -> SavingMode:
        self._budget.start_layer()
        return super().__enter__()

    def __torch_dispatch__(
        self, func: OpOverload | HigherOrderOperator, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            self._forget(_written(func, args, kwargs))
        out = func(*args, **kwargs)
        kind = _kind(func)
        if kind is not None and _thread.keeps:
            assert isinstance(func, OpOverload)  # the kinds are kinds of operators
            result = Result(func, kind)
            if not _draws_random_numbers(func, args, kwargs) and self._budget.take(kind, _bytes(out)):
                # Detached, or it would hold the graph that is made of it, and so itself.
                result.values = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, out)
            self.results.append(result)
        return out

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        # What a layer's last product gives goes into the layer's result, which backward does not ask for.
        if self.results and self.results[-1].kind == PRODUCT:
            self._drop(self.results[-1])

    def _forget(self, storages: set[int]) -> None:
        """Drops what is about to be changed in place."""
        for result in self.results:
            if storages.intersection(tensor.untyped_storage()._cdata for tensor in result.tensors):
                self._drop(result)

    def _drop(self, result: Result) -> None:
        self._budget.give_back(_bytes(result.values))
        result.values = None


class ReusingMode(TorchDispatchMode):
    """Reuses kept results during a layer's second forward, each once."""

    supports_higher_order_operators = True

    def __init__(self, results: list[Result]) -> None:
        super().__init__()
        self._results = results
        self._next = 0

    def __enter__(self) -> ReusingMode:
        self._next = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: OpOverload | HigherOrderOperator, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if _kind(func) is None or not _thread.keeps:
            return func(*args, **(kwargs or {}))
        result = self._results[self._next]
        self._next += 1
        if result.op is not func:
            raise RuntimeError(
                f"gradient checkpointing: a layer computed {result.op} in forward and {func} in its place in "
                "backward; what it does must not depend on anything that changes in between"
            )
        if result.values is None:
            return func(*args, **(kwargs or {}))
        values, result.values = result.values, None
        return values


@functools.cache
def _overloads(names: tuple[str, ...]) -> frozenset[OpOverload]:
    packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    return frozenset(packet.default for packet in packets)


@functools.cache
def _kind(op: OpOverload | HigherOrderOperator) -> str | None:
    """Returns whether an operator is a product with a weight or attention; None: neither."""
    if not isinstance(op, OpOverload):
        return None
    if op in _overloads(_PRODUCT_OPS) or op.name() in _OTHER_PRODUCTS:
        return PRODUCT
    # Kernels from the hub are registered under names of their own.
    is_attention = op in _overloads(_ATTENTION_OPS) or op.name() in _OTHER_ATTENTION or "flash_attn" in str(op)
    return ATTENTION if is_attention else None


def _draws_random_numbers(op: OpOverload, args: tuple, kwargs: dict) -> bool:
    """Returns whether attention drops scores: not run again, it would change the random numbers that follow."""
    for number, argument in enumerate(op._schema.arguments):
        if "dropout" in argument.name:
            given = args[number] if number < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given)
    return False


def _written(op: OpOverload, args: tuple, kwargs: dict) -> set[int]:
    """Returns the storages that an operator writes to."""
    storages: set[int] = set()
    for number, argument in enumerate(op._schema.arguments):
        if argument.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            storages.update(tensor.untyped_storage()._cdata for tensor in _tensors(given))
    return storages


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _bytes(values: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(values))
