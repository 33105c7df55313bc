"""Makes the optimizer of a planned step as it is after its first update: with what it keeps for each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from .memory_timeline import GRADIENTS, OPTIMIZER
from .memory_tracker import MemoryTracker
from .training_setup import TrainingSetup

# bitsandbytes: numbers of 8 bits that share a constant.
BLOCK_8BIT = 256
# Names in transformers (`optim`), in parts. All others are planned as AdamW.
_IN_8_BITS = ("8bit",)
_WITHOUT_AVERAGES = ("sgd", "adafactor")
_ADAM = ("adamw",)


class PlannedOptimizer(Protocol):
    """Names what a simulated step calls."""

    def step(self) -> object:
        """Updates the weights."""

    def zero_grad(self) -> None:
        """Lets go of the gradients."""


class SimpleOptimizer:
    """Takes the memory of what an optimizer keeps, and nothing for its updates."""

    def __init__(self, weights: Sequence[torch.Tensor], kept: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        self._weights, self._kept = weights, kept
        self._averages: list[torch.Tensor] = []

    def step(self) -> None:
        """Makes what is kept the first time."""
        if not self._averages:
            self._averages = [tensor for weight in self._weights for tensor in self._kept(weight)]

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        for weight in self._weights:
            weight.grad = None


def _in_8_bits(weight: torch.Tensor) -> list[torch.Tensor]:
    """Returns two averages of 8 bits a number, and the constants of their blocks, as bitsandbytes' 8-bit AdamW."""
    constants = torch.empty(2, -(-weight.numel() // BLOCK_8BIT), dtype=torch.float32)
    return [torch.empty(2, weight.numel(), dtype=torch.uint8), constants]


def is_known(optim: str) -> bool:
    """Says whether an optimizer, by its name in transformers, is planned as what it is, and not as AdamW."""
    return any(part in optim for part in (*_IN_8_BITS, *_WITHOUT_AVERAGES, *_ADAM))


def keeps_averages(optim: str) -> bool:
    """Says whether an optimizer keeps two averages with the dtype of the weights."""
    return not any(part in optim for part in (*_IN_8_BITS, *_WITHOUT_AVERAGES))


def planned_optimizer(
    setup: TrainingSetup, trained: Iterable[torch.nn.Module], tracker: MemoryTracker
) -> PlannedOptimizer:
    """Makes the optimizer of the models that train; with gradients if micro-batches add to them."""
    weights = [weight for model in trained for weight in model.parameters() if weight.requires_grad]
    optimizer = _made(setup.optim, weights)
    with tracker.labelling(GRADIENTS):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
    with tracker.labelling(OPTIMIZER):
        optimizer.step()
    if setup.gradient_accumulation_steps == 1:
        optimizer.zero_grad()
    return optimizer


def _made(optim: str, weights: list[torch.nn.Parameter]) -> PlannedOptimizer:
    if any(part in optim for part in _IN_8_BITS):
        return SimpleOptimizer(weights, _in_8_bits)
    if any(part in optim for part in _WITHOUT_AVERAGES):
        # Adafactor keeps a number a row and a column.
        return SimpleOptimizer(weights, lambda _: [])
    return torch.optim.AdamW(weights, fused=True)
