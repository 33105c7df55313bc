"""Counts what a rank sends over the wire in an optimizer step, by collective, for each engine of `SHARINGS`.

Of a tensor of S bytes, whole, each of n ranks sends S (n - 1) / n to gather it or to reduce and scatter it, twice that
to have all ranks hold the sum, and of its own S / n all but what stays with it where parts change places (the ring
algorithms, Patarasuk and Yuan 2009; NCCL's bandwidth formulas).

| engine | in each micro-batch | once a step |
|---|---|---|
| DDP, SP | | gradients, summed on all ranks |
| ZeRO-1 | | gradients, summed on all ranks; weights that train, gathered |
| ZeRO-2 | gradients, summed on all ranks | weights that train, gathered |
| ZeRO-3 | weights, gathered; gradients, scattered, a head's in float32 | weights below 100,000 numbers, gathered |
| FSDP | weights, gathered; with FSDP2 the gradient of a trained head, scattered in float32 | gradients, scattered |
| TP | hidden states, summed on all ranks | |
| SP | what attention gets and gives changes places | |

FSDP gathers layers in forward and in backward, FSDP2 the embedding and a trained head too; all else once. ZeRO-3
gathers in backward what is not whole still. TP sums twice a layer, in forward, in backward and where checkpointing
computes a layer again, and the head's gradient; SP moves queries, keys, values and results as often.

A pass without gradient (a reference, the policy that sampled) gathers each weight once, and so does a generation.
Checkpointing costs FSDP and ZeRO-3 nothing: a layer is computed again while it is whole for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from .gpu_facts import GPUS_OF_A_MACHINE
from .roofline.work import Work
from .sharding import REUSE_DISTANCE, ModelSizes, model_sizes, wire_itemsize
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class Wire:
    """Holds the bytes that a rank sends in an optimizer step, by collective."""

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_reduce: float = 0.0
    all_to_all: float = 0.0

    def __add__(self, other: Wire) -> Wire:
        return self._with(other, 1.0)

    def __sub__(self, other: Wire) -> Wire:
        return self._with(other, -1.0)

    def _with(self, other: Wire, factor: float) -> Wire:
        names = (item.name for item in fields(self))
        return Wire(*(getattr(self, name) + factor * getattr(other, name) for name in names))

    @property
    def bytes(self) -> float:
        """Returns the bytes of all."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Passes:
    """Counts the passes of an optimizer step: forward and backward, without gradient, and generations."""

    trained: float
    scored: float = 0.0
    generated: float = 0.0


def wire_of(setup: TrainingSetup, max_length: int, passes: Passes) -> Wire:
    """Counts what a rank sends in an optimizer step of sequences of `max_length` tokens; nothing on one device.

    Of PPO only the policy's; frozen weights that the optimizer does not hold are never reduced.
    """
    if setup.num_gpus == 1:
        return Wire()
    sizes, share = model_sizes(setup), (setup.num_gpus - 1) / setup.num_gpus
    counted = _COUNTED[setup.engine](setup, sizes, passes, _hidden_bytes(setup, max_length))
    return Wire(*(share * getattr(counted, item.name) for item in fields(counted)))


def wire_work(wire: Wire, setup: TrainingSetup) -> Work:
    """Returns the wire's part of a step's work: what hides behind the GPU's, and what the GPU waits for."""
    if setup.num_gpus > GPUS_OF_A_MACHINE:
        return Work(network_bytes=wire.bytes)
    if setup.engine in ("tp", "sp"):
        awaited = wire.bytes if setup.engine == "tp" else wire.all_to_all
        return Work(link_bytes=wire.bytes - awaited, awaited_bytes=awaited)
    return Work(link_bytes=wire.bytes)


# What follows counts whole tensors; the share of them that a rank sends is the same for all collectives.


def _ddp(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    return Wire(all_reduce=2 * sizes.trained_bytes)


def _zero1(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    trained = sizes.trained * wire_itemsize(setup)
    return Wire(all_gather=trained, all_reduce=2 * trained)


def _zero2(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    trained = sizes.trained * wire_itemsize(setup)
    return Wire(all_gather=trained, all_reduce=2 * trained * passes.trained)


def _zero3(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    large = sizes.all - sizes.small
    again = max(0, large - REUSE_DISTANCE // 2)
    gathered = passes.trained * (large + again) + (passes.scored + passes.generated) * large + sizes.small
    itemsize = wire_itemsize(setup)
    scattered = sizes.whole_gradients * itemsize + 4 * (sizes.trained - sizes.whole_gradients)
    return Wire(all_gather=gathered * itemsize, reduce_scatter=passes.trained * scattered)


def _fsdp1(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    return _fsdp(setup, sizes, passes, sizes.layers, sizes.trained)


def _fsdp2(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    backward = sizes.embedding + sizes.layers + (sizes.head if sizes.tiled else 0)
    wire = _fsdp(setup, sizes, passes, backward, sizes.whole_gradients)
    return replace(wire, reduce_scatter=wire.reduce_scatter + passes.trained * 4 * sizes.tiled)


def _fsdp(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, backward: float, summed: float) -> Wire:
    """Counts what FSDP sends; backward: numbers that are gathered once more for it; summed: those of gradients."""
    gathered = passes.trained * (sizes.all + backward) + (passes.scored + passes.generated) * sizes.all
    itemsize = wire_itemsize(setup)
    return Wire(all_gather=gathered * itemsize, reduce_scatter=summed * itemsize)


def _passes_of_layers(setup: TrainingSetup, passes: Passes) -> float:
    """Counts the passes over a layer: forward, backward, and forward again where it is checkpointed."""
    return (3 if setup.gradient_checkpointing else 2) * passes.trained + passes.scored


def _tp(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    sums = 2 * setup.num_layers * _passes_of_layers(setup, passes) + passes.trained
    return Wire(all_reduce=2 * sums * hidden)


def _sp(setup: TrainingSetup, sizes: ModelSizes, passes: Passes, hidden: float) -> Wire:
    config = setup.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    # Queries and results, keys and values: of each the part of a rank.
    parts = (2 + 2 * groups / heads) * hidden / setup.num_gpus
    moved = setup.num_layers * _passes_of_layers(setup, passes) * parts
    return Wire(all_reduce=2 * sizes.trained_bytes, all_to_all=moved)


_COUNTED: dict[str, Callable[[TrainingSetup, ModelSizes, Passes, float], Wire]] = {
    "ddp": _ddp,
    "zero1": _zero1,
    "zero2": _zero2,
    "zero3": _zero3,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "tp": _tp,
    "sp": _sp,
}


def _hidden_bytes(setup: TrainingSetup, max_length: int) -> float:
    """Returns the bytes of a micro-batch's hidden states, of padded rows."""
    sequences = setup.per_device_train_batch_size * setup.completions_of_a_row
    return sequences * max_length * setup.config.get_text_config().hidden_size * wire_itemsize(setup)
