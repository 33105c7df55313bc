"""Chooses two shallow models that tell about a deep one: its layers repeat, so what they take is a straight line.

Layers that differ, of a hybrid or of one with windows, repeat in a pattern. Both models end as the whole one does, and
the deeper one has one repetition of the pattern more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable
from dataclasses import dataclass

from transformers import PreTrainedModel

from trl_fast.modeling.layer_kinds import layer_kinds

from .fake_models import decoder_layers, meta_model
from .training_setup import TrainingSetup

# The fewest layers that have a first and a last one; the deeper model has a layer between.
_FEWEST = 2
# Offloading has activations of a layer's neighbours on the device too: the layer between has such that are like it.
_FEWEST_OFFLOADED = 4


@dataclass(frozen=True)
class ShallowModels:
    """Holds the numbers of layers of two shallow models."""

    fewer: int
    more: int

    @property
    def repeated(self) -> int:
        """Returns how many layers the deeper model has more: those of one repetition."""
        return self.more - self.fewer

    def share(self, depth: int) -> float:
        """Returns where a model of `depth` layers lies on the line from the one, 0, to the other, 1."""
        return (depth - self.fewer) / self.repeated

    def like(self, layer: int) -> int:
        """Returns the number of a layer of the deeper model that is like this one of the whole model."""
        beyond = max(layer - self.more + 1, 0)
        return layer - -(-beyond // self.repeated) * self.repeated


@functools.lru_cache(maxsize=32)
def shallow_models(setup: TrainingSetup) -> ShallowModels | None:
    """Returns the shallow models that tell about the setup's; None where these would not be shallower."""
    depth = setup.num_layers
    fewest = _FEWEST_OFFLOADED if setup.activation_offloading else _FEWEST
    if depth <= fewest + 1:
        return None
    period = _period(_layers(meta_model(setup)))
    if period > 1:
        # A layer of each kind between the first and the last.
        fewest = max(fewest, period + 2)
    # The first layers of some get embeddings of images, and the layer between is not one of these.
    fewest += len(getattr(getattr(setup.config, "vision_config", None), "deepstack_visual_indexes", ()) or ())
    fewer = fewest + (depth - fewest) % period
    return ShallowModels(fewer, fewer + period) if fewer + period < depth else None


def _layers(model: PreTrainedModel) -> list[Hashable]:
    """Returns of each layer what it takes memory and time by: its mixers, and the shapes of its weights."""
    layers = [*decoder_layers(model)]
    mixers: list[list[Hashable]] = [[] for _ in layers]
    for kind in layer_kinds(model):
        mixers[kind.layer].append(kind._replace(layer=0))
    shapes = [tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in layers]
    return [(tuple(found), shape) for found, shape in zip(mixers, shapes, strict=True)]


def _period(layers: list[Hashable]) -> int:
    """Returns after how many layers they repeat; their number if they do not."""
    return next(
        period
        for period in itertools.count(1)
        if period == len(layers) or layers[period:] == layers[: len(layers) - period]
    )
