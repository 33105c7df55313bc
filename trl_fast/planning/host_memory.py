"""Estimates what a process takes of the host's memory: CPU memory beside the GPU's."""

from __future__ import annotations

from dataclasses import dataclass

from .fake_models import meta_model
from .memory_sizes import GIB, gib
from .peak_estimates import simulated
from .shallow_models import shallow_models
from .training_setup import TrainingSetup

# Python, torch with CUDA, and the other libraries.
LIBRARIES_BYTES = 2 * GIB


@dataclass(frozen=True)
class HostMemory:
    """Holds bytes of the host's memory in one process.

    loading: models before they move to the GPU; offloaded: activations that wait there in a step.
    """

    loading: int
    offloaded: int

    @property
    def bytes(self) -> int:
        """Returns the most there is at a time: models are on the GPU when activations come."""
        return LIBRARIES_BYTES + max(self.loading, self.offloaded)

    def __str__(self) -> str:
        parts = [f"{gib(LIBRARIES_BYTES)} for libraries"]
        parts += [f"{gib(self.loading)} while models load"] if self.loading else []
        parts += [f"{gib(self.offloaded)} for offloaded activations"] if self.offloaded else []
        return f"{gib(self.bytes)} GiB ({', '.join(parts)})"


def host_memory(setup: TrainingSetup, max_length: int) -> HostMemory:
    """Estimates the host's memory of one process; without the dataset, which is mapped from disk.

    Quantized weights go to the GPU as they are read, a piece at a time.
    """
    size = 0
    if setup.device == "gpu" and setup.quantization is None:
        teaches = setup.has_teacher
        copies = 1 + (setup.needs_reference_model and not teaches) + (setup.method == "ppo")
        size = copies * _weight_bytes(setup) + (_weight_bytes(setup.of_teacher) if teaches else 0)
    return HostMemory(size, _offloaded(setup, max_length) if setup.activation_offloading else 0)


def _weight_bytes(setup: TrainingSetup) -> int:
    return sum(weight.nbytes for weight in meta_model(setup).parameters())


def _offloaded(setup: TrainingSetup, max_length: int) -> int:
    shallow = shallow_models(setup)
    if shallow is None:
        return simulated(setup, max_length).host_bytes
    fewer, deeper = (simulated(setup, max_length, layers).host_bytes for layers in (shallow.fewer, shallow.more))
    return round(fewer + shallow.share(setup.num_layers) * (deeper - fewer))
