"""Computes the memory that a run holds from its first step to its last: weights, gradients, optimizer states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trl_fast.parallel.partitions import whole_size

# What an optimizer keeps of each trained number, by how its name begins: a tensor of the weight's dtype so many times,
# or so many bytes. Longer names first.
_STATES_LIKE_WEIGHT = {"adamw_torch_4bit": None, "adamw_torch_8bit": None, "adamw_torch": 2, "adamw_apex": 2}
_STATES_LIKE_WEIGHT |= {"adagrad": 1, "rmsprop": 1, "adafactor": 0, "sgd": 0}


@dataclass(frozen=True)
class ResidentMemory:
    """Holds bytes on one device, before sharding.

    - `weights`: of the policy, and of the models beside it.
    - `gradients`: of the trained weights.
    - `optimizer`: its states; None: unknown for this optimizer.
    """

    weights: int
    gradients: int
    optimizer: int | None

    @property
    def total(self) -> int:
        """Returns the sum of what is known."""
        return self.weights + self.gradients + (self.optimizer or 0)


def parameter_count(weight: torch.Tensor) -> int:
    """Returns how many numbers a weight of any shape and dtype holds, also if DeepSpeed shards it or it has 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return whole_size(weight)


def resident_memory(models: Iterable[torch.nn.Module], optimizer: str) -> ResidentMemory:
    """Computes what models hold while they are trained, exactly, from their weights' sizes.

    optimizer: the name of `optim`.
    """
    weights = {id(weight): weight for model in models for weight in model.parameters()}.values()
    sizes = [(weight, whole_size(weight) * weight.element_size()) for weight in weights]
    trained = sum(size for weight, size in sizes if weight.requires_grad)
    times = next((times for name, times in _STATES_LIKE_WEIGHT.items() if optimizer.startswith(name)), None)
    return ResidentMemory(sum(size for _, size in sizes), trained, None if times is None else times * trained)
