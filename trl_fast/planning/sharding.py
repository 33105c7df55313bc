"""Estimates a step's memory on one of several devices that share weights, gradients and optimizer (FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .fake_models import decoder_layers, meta_model
from .memory_timeline import (
    EMBEDDING_STAGE,
    FIRST_LAYER,
    GATHERED,
    GRADIENTS,
    LAST_LAYER,
    MIDDLE_LAYERS,
    OPTIMIZER,
    OPTIMIZER_STAGE,
    REFERENCE,
    VALUE_BACKWARD_STAGE,
    WEIGHTS,
    Peak,
)
from .training_setup import TrainingSetup

# Each device has its share of them.
SHARED = (WEIGHTS, REFERENCE, OPTIMIZER, GRADIENTS)
# While a layer computes, the next one is gathered.
LAYERS_GATHERED = 2
_BACKWARD = (LAST_LAYER, MIDDLE_LAYERS, FIRST_LAYER, EMBEDDING_STAGE, VALUE_BACKWARD_STAGE)


@dataclass(frozen=True)
class GatheredBytes:
    """Holds the bytes of whole weights on a device: those always there, of layers at work, and of gradients."""

    root: int
    layers: int
    gradients: int

    @classmethod
    def of(cls, setup: TrainingSetup) -> GatheredBytes:
        """Counts them: embedding, last norm and head stay gathered; layers come and go, two at a time.

        Gathered weights and the gradients that are reduced have the dtype of the products.
        """
        model = meta_model(setup)
        itemsize = 2 if setup.bf16 else setup.torch_dtype.itemsize
        size = lambda weights: sum(weight.numel() * min(itemsize, weight.itemsize) for weight in weights)  # noqa: E731
        layer = max(size(layer.parameters()) for layer in decoder_layers(model))
        in_layers = sum(size(layer.parameters()) for layer in decoder_layers(model))
        root = size(model.parameters()) - in_layers
        gradients = 0 if setup.lora_r is not None else LAYERS_GATHERED * layer + root
        return cls(root, LAYERS_GATHERED * layer, gradients)


def sharded(peaks: dict[str, Peak], setup: TrainingSetup) -> dict[str, Peak]:
    """Returns the stages' peaks on one of the setup's devices; peaks: of a device that holds everything."""
    if setup.num_gpus == 1:
        return peaks
    gathered = GatheredBytes.of(setup)
    return {stage: _on_one(stage, peak, gathered, setup.num_gpus) for stage, peak in peaks.items()}


def _on_one(stage: str, peak: Peak, gathered: GatheredBytes, devices: int) -> Peak:
    parts = {kind: size / devices if kind in SHARED else size for kind, size in peak.parts.items()}
    if stage != OPTIMIZER_STAGE:
        parts[GATHERED] = gathered.root + gathered.layers + (gathered.gradients if stage in _BACKWARD else 0)
    return replace(peak, parts=parts)
