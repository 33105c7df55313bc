"""Says what the ranks of an engine share, and estimates a step's memory on one of them: one table, `SHARINGS`.

| engine | weights | gradients | optimizer | what is whole for a while |
|---|---|---|---|---|
| DDP | whole | whole, and once more in its buckets | whole | |
| ZeRO-1 | whole | whole | share | a bucket |
| ZeRO-2 | whole | share | share | a bucket |
| ZeRO-3 | share | share | share | layers whose next use is near, a bucket |
| FSDP1 | share | share; whole while micro-batches add to them | share | layers at work, the head |
| FSDP2 | share | as FSDP1's, but for the head's: of it never more than a tile beside the share | share | as FSDP1 |
| TP | share | share | share | |
| SP | whole | whole, and once more in DDP's buckets | whole | |

Written from the sources of torch 2.13, accelerate 1.15 and DeepSpeed 0.19, with the settings that accelerate gives
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from .fake_models import decoder_layers, planned_models
from .memory_timeline import (
    ATTENTION,
    EMBEDDING_STAGE,
    FIRST_LAYER,
    GATHERED,
    GRADIENTS,
    HEAD,
    HEAD_STAGE,
    LAST_LAYER,
    MIDDLE_LAYERS,
    OPTIMIZER,
    OPTIMIZER_STAGE,
    REFERENCE,
    SAVED,
    TEACHER_STAGE,
    VALUE_BACKWARD_STAGE,
    WEIGHTS,
    WORKSPACE,
    Peak,
)
from .planned_optimizers import keeps_averages
from .training_setup import TrainingSetup

# While a layer computes, the next one is gathered.
LAYERS_GATHERED = 2
# DeepSpeed's defaults, in numbers: of a bucket of gradients; of the weights between a use and the next one within
# which a weight stays whole (ZeRO-3), so that half of them lie between a layer and the end of forward; of a weight
# that is never shared.
BUCKET, REUSE_DISTANCE, NEVER_SHARED = 500_000_000, 1_000_000_000, 100_000
_BACKWARD = (LAST_LAYER, MIDDLE_LAYERS, FIRST_LAYER, EMBEDDING_STAGE, VALUE_BACKWARD_STAGE)
_EVERYTHING = frozenset({WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER})
_ACTIVATIONS = frozenset({SAVED, ATTENTION, HEAD, WORKSPACE})


class ModelSizes(NamedTuple):
    """Counts the numbers that a model's weights have.

    embedding, head: of the first and of what follows the layers (last norm and head, with tied weights the embedding
    too); layers, layer: of all layers, and of the largest; adapters and all. trained: of those that train, of
    `trained_bytes`; small: of weights that ZeRO-3 never shares. tiled: of the head's weight, if it trains;
    whole_gradients: of weights whose gradients FSDP2 sums, which are all that train but a head of its own.
    """

    embedding: int
    layers: int
    layer: int
    head: int
    trained: int
    trained_bytes: int
    small: int
    tiled: int
    whole_gradients: int

    @property
    def all(self) -> int:
        """Counts all weights."""
        return self.embedding + self.layers + self.head


@functools.lru_cache(maxsize=32)
def model_sizes(setup: TrainingSetup) -> ModelSizes:
    """Counts the weights of a setup's policy, from all layers' shapes."""
    with planned_models(setup, setup.max_length) as models:
        return _sizes_of(models.policy)


def _sizes_of(model: PreTrainedModel | PeftModel) -> ModelSizes:
    count = lambda weights: sum(weight.numel() for weight in weights)  # noqa: E731
    every = list(model.parameters())
    layers = [count(layer.parameters()) for layer in decoder_layers(model)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    first = 0 if tied else count(embedding.parameters())
    trained = [weight for weight in every if weight.requires_grad]
    # Of a head that carries an adapter what trains is not its weight.
    weight = getattr(head, "weight", None)
    tiled = weight.numel() if weight is not None and weight.requires_grad else 0
    return ModelSizes(
        *(first, sum(layers), max(layers), count(every) - sum(layers) - first, count(trained)),
        trained_bytes=sum(weight.nbytes for weight in trained),
        small=count(weight for weight in every if weight.numel() < NEVER_SHARED),
        tiled=tiled,
        whole_gradients=count(trained) - (0 if tied else tiled),
    )


def wire_itemsize(setup: TrainingSetup) -> int:
    """Returns the bytes of a number that is gathered or reduced: of 16 bits under autocast."""
    return 2 if setup.bf16 else setup.torch_dtype.itemsize


@dataclass(frozen=True)
class Sharing:
    """Says what the ranks of an engine share.

    - `title`: its name for people; `config`: under --accelerate_config, None where accelerate has none with that name.
    - `shares`: kinds of memory of which a rank has its part.
    - `splits_batch`: whether ranks have different rows; else all work on the same ones.
    - `trained_bytes`: of a weight that trains under mixed precision, its gradient and each of its averages, None: as
      it is loaded. accelerate has FSDP train float32 weights, whatever their dtype was.
    - `copies_weights`: whether the optimizer has a float32 copy of each weight that trains.
    - `whole`: the bytes of whole weights and buckets on a rank, by setup, sizes and stage of the step.
    - `accumulates_whole`: whether gradients are whole from the first micro-batch of several to the last.
    """

    title: str
    config: str | None
    shares: frozenset[str]
    splits_batch: bool = True
    trained_bytes: int | None = None
    copies_weights: bool = False
    whole: Callable[[TrainingSetup, ModelSizes, str], float] = lambda setup, sizes, stage: 0
    accumulates_whole: bool = False


def _of_ddp(setup: TrainingSetup, sizes: ModelSizes, stage: str) -> float:
    """Counts DDP's buckets, which are there from its start to its end, beside the gradients."""
    return sizes.trained_bytes


def _of_buckets(setup: TrainingSetup, sizes: ModelSizes, stage: str) -> float:
    return BUCKET * wire_itemsize(setup) if stage in _BACKWARD else 0


def _of_fsdp1(setup: TrainingSetup, sizes: ModelSizes, stage: str) -> float:
    """Counts layers at work; all else is one unit, whole from forward's start to backward's end."""
    if stage == OPTIMIZER_STAGE:
        return 0
    weights = sizes.embedding + sizes.head + min(LAYERS_GATHERED * sizes.layer, sizes.layers)
    gradients = weights * sizes.trained / sizes.all if stage in _BACKWARD and not _accumulates(setup) else 0
    return (weights + gradients) * wire_itemsize(setup)


def _of_fsdp2(setup: TrainingSetup, sizes: ModelSizes, stage: str) -> float:
    """Counts layers at work, the embedding at both ends, the head in forward, and in backward if it trains."""
    if stage == OPTIMIZER_STAGE:
        return 0
    layers = min(LAYERS_GATHERED * sizes.layer, sizes.layers)

    def at_work(head: int) -> int:
        return {
            HEAD_STAGE: head + sizes.layer,
            LAST_LAYER: (head if sizes.tiled else 0) + layers,
            MIDDLE_LAYERS: layers,
            FIRST_LAYER: sizes.layer + sizes.embedding,
            EMBEDDING_STAGE: sizes.layer + sizes.embedding,
        }.get(stage, max(layers, sizes.layer + max(sizes.embedding, head)))

    gradients = 0.0
    if stage in _BACKWARD and not _accumulates(setup):
        gradients = at_work(sizes.head - (sizes.trained - sizes.whole_gradients)) * sizes.trained / sizes.all
    return (at_work(sizes.head) + gradients) * wire_itemsize(setup)


def _of_zero3(setup: TrainingSetup, sizes: ModelSizes, stage: str) -> float:
    at_work = 0 if stage == OPTIMIZER_STAGE else REUSE_DISTANCE // 2 + LAYERS_GATHERED * sizes.layer
    whole = min(sizes.all, sizes.small + at_work)
    return whole * wire_itemsize(setup) + _of_buckets(setup, sizes, stage)


# By the names that --accelerate_config has for them, where it has one.
SHARINGS: dict[str, Sharing] = {
    "ddp": Sharing("DDP", "multi_gpu", frozenset(), whole=_of_ddp),
    "zero1": Sharing("ZeRO-1", "zero1", frozenset({OPTIMIZER}), copies_weights=True, whole=_of_buckets),
    "zero2": Sharing("ZeRO-2", "zero2", frozenset({OPTIMIZER, GRADIENTS}), copies_weights=True, whole=_of_buckets),
    "zero3": Sharing("ZeRO-3", "zero3", _EVERYTHING, copies_weights=True, whole=_of_zero3),
    "fsdp1": Sharing("FSDP1", "fsdp1", _EVERYTHING, trained_bytes=4, whole=_of_fsdp1, accumulates_whole=True),
    "fsdp2": Sharing("FSDP2", "fsdp2", _EVERYTHING, trained_bytes=4, whole=_of_fsdp2, accumulates_whole=True),
    # Of the MLP and the heads of attention each rank has its part too; that is left out, to the safe side.
    "tp": Sharing("tensor parallelism", None, _EVERYTHING, splits_batch=False),
    "sp": Sharing("sequence parallelism (Ulysses)", None, _ACTIVATIONS, splits_batch=False, whole=_of_ddp),
}


def sharing_of(setup: TrainingSetup) -> Sharing:
    """Returns what the ranks of a setup's engine share.

    Raises:
        ValueError: the engine is none of SHARINGS.
    """
    if setup.engine not in SHARINGS:
        raise ValueError(f"engine={setup.engine!r} is unknown; expected one of {', '.join(SHARINGS)}")
    return SHARINGS[setup.engine]


def engine_named(name: str) -> str:
    """Returns the engine of SHARINGS that has this name, its own or that of a configuration of accelerate.

    Raises:
        ValueError: none has.
    """
    for engine, sharing in SHARINGS.items():
        if name in (engine, sharing.config):
            return engine
    raise ValueError(f"accelerate_config={name!r}: expected a file or one of {', '.join(SHARINGS)}")


def _accumulates(setup: TrainingSetup) -> bool:
    """Tells whether gradients of several micro-batches are added."""
    return setup.gradient_accumulation_steps > 1


def sharded(peaks: dict[str, Peak], setup: TrainingSetup) -> dict[str, Peak]:
    """Returns the stages' peaks on one of the setup's devices; peaks: of a device that holds everything."""
    if setup.num_gpus == 1:
        return peaks
    sizes = model_sizes(setup)
    return {stage: _on_one(stage, peak, setup, sizes) for stage, peak in peaks.items()}


def _on_one(stage: str, peak: Peak, setup: TrainingSetup, sizes: ModelSizes) -> Peak:
    sharing = sharing_of(setup)
    parts = resident(peak.parts, setup)
    if sharing.accumulates_whole and _accumulates(setup) and stage != OPTIMIZER_STAGE:
        summed = sizes.whole_gradients if setup.engine == "fsdp2" else sizes.trained
        # What is summed in tiles is there as float32 shares.
        parts[GRADIENTS] = summed * wire_itemsize(setup) + (sizes.trained - summed) * 4 / setup.num_gpus
    if stage == TEACHER_STAGE:
        setup, sizes = setup.of_teacher, model_sizes(setup.of_teacher)
    parts[GATHERED] = sharing.whole(setup, sizes, stage)
    return replace(peak, parts=parts)


def resident(parts: Mapping[str, float], setup: TrainingSetup) -> dict[str, float]:
    """Returns the bytes by kind on one of the setup's devices; parts: those of a device that holds everything.

    Gradients are those that the optimizer is given; averages and gradients that are not there are not added.
    """
    if setup.num_gpus == 1:
        return dict(parts)
    more, shares = _as_trained(setup, model_sizes(setup)), sharing_of(setup).shares
    own = {kind: size + (more.get(kind, 0) if kind == WEIGHTS or size else 0) for kind, size in parts.items()}
    return {kind: size / setup.num_gpus if kind in shares else size for kind, size in own.items()}


def _as_trained(setup: TrainingSetup, sizes: ModelSizes) -> dict[str, float]:
    """Returns by kind the bytes that all ranks' weights, gradients and averages take beyond those of one device."""
    sharing, averages = sharing_of(setup), 2 if keeps_averages(setup.optim) else 0
    if sharing.copies_weights:
        return {OPTIMIZER: 4 * sizes.trained + averages * (4 * sizes.trained - sizes.trained_bytes)}
    if sharing.trained_bytes is None or not setup.bf16:
        return {}
    more = sharing.trained_bytes * sizes.trained - sizes.trained_bytes
    return {WEIGHTS: more, GRADIENTS: more, OPTIMIZER: averages * more}
