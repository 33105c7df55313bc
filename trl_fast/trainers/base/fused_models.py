"""Has the layers of a trainer's models fused while it trains or evaluates; after it they have their own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, Trainer

from trl_fast.modeling.fused_layers import FUSED_LAYERS, fuse_layers, restore_layers
from trl_fast.modeling.model_changes import has_change


class FusedModels:
    """Holds those of a trainer's models whose layers were fused when it was made: policy, reference, value model."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._models: list[PreTrainedModel] | None = None
        self._is_running = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Has the models' layers fused within the context, whatever ends it; one within another changes nothing."""
        if self._is_running:
            yield
            return
        self._is_running = True
        try:
            # The first time they are fused still, since the trainer was made.
            self._models = list(self._found()) if self._models is None else self._models
            for model in self._models:
                fuse_layers(model, self._trainer.args.device)
            yield
        finally:
            self._is_running = False
            for model in self._models or ():
                restore_layers(model)

    def _found(self) -> Iterator[PreTrainedModel]:
        reference = getattr(self._trainer, "reference", None)
        held = [*vars(self._trainer).values(), getattr(reference, "model", None)]
        found = (value for value in held if isinstance(value, torch.nn.Module))
        modules = dict.fromkeys(module for value in found for module in value.modules())
        models = (module for module in modules if isinstance(module, PreTrainedModel))
        return (model for model in models if has_change(model, FUSED_LAYERS))
