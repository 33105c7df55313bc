"""Takes and sets the states of a process's random number generators."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def random_states(*, with_gpus: bool = True) -> dict[str, Any]:
    """Returns the states of Python's, numpy's and torch's generators, in types that `torch.load` takes as safe."""
    name, keys, *rest = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "gpus": torch.cuda.get_rng_state_all() if with_gpus and torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Sets what `random_states` has returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["gpus"]:
        torch.cuda.set_rng_state_all(states["gpus"])
