"""Counts the divergence of two heads, ours and TRL's, whose teacher is as large as the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_fast.ops import linear_divergence
from trl_fast.ops.head.plan import default_workspace
from trl_fast.planning.gpu_facts import Gpu

from ..head_size import REFERENCE, Size
from .fake_devices import CUDA
from .fake_gpu import fake_gpu
from .head import HeadCase
from .operator_counter import Counter, Counts
from .triton_kernels import counted_kernels


class Mode(NamedTuple):
    """Tells which divergence it is, as TRL's `beta`, and whether the student's weight trains."""

    beta: float
    weight_trains: bool


MODES = {
    "forward KL, trained": Mode(0.0, weight_trains=True),
    "JSD, trained": Mode(0.5, weight_trains=True),
    "JSD, frozen": Mode(0.5, weight_trains=False),
    "reverse KL, frozen": Mode(1.0, weight_trains=False),
}
SIZES = (Size(8192, 2048, 151936), REFERENCE)


@dataclass(frozen=True)
class DivergenceCase(HeadCase):
    """Holds ours and TRL's counts of a divergence for a size and a mode."""

    @property
    def passes(self) -> int:
        """Returns the passes over N·V·H: both heads' logits, the hidden states' gradient, and the weight's."""
        return 3 + MODES[self.mode].weight_trains


def count_divergence(size: Size, mode: str, gpu: Gpu, workspace_bytes: int | None = None) -> DivergenceCase:
    """Counts a call, forward and backward, in bfloat16. workspace_bytes: as in count_head."""
    if workspace_bytes is None:
        workspace_bytes = default_workspace(gpu.memory_bytes, gpu.memory_bytes)
    counts = [_count(size, MODES[mode], gpu, workspace) for workspace in (workspace_bytes, None)]
    return DivergenceCase(size, mode, *counts, gpu, workspace_bytes)


def _count(size: Size, mode: Mode, gpu: Gpu, workspace: int | None) -> Counts:
    """Counts ours; without a workspace, TRL's."""
    counter = Counter()
    with fake_gpu(gpu, counter), counted_kernels(counter):
        bf16 = {"dtype": torch.bfloat16, "device": CUDA}
        hidden = torch.empty(size.rows, size.hidden, **bf16, requires_grad=True)
        weight = torch.empty(size.vocab, size.hidden, **bf16, requires_grad=mode.weight_trains)
        teacher = (torch.empty(size.rows, size.hidden, **bf16), torch.empty(size.vocab, size.hidden, **bf16))
        upstream = torch.empty(size.rows, device=CUDA)
        counter.start()
        if workspace is None:
            given = (hidden, weight, None, *teacher, None, mode.beta)
            ChunkedDivergenceFunction.apply(*given)[0].backward(upstream)
        else:
            options = {"weights": upstream, "beta": mode.beta, "workspace_bytes": workspace, "backend": "cuda"}
            linear_divergence(hidden, weight, *teacher, **options).loss.backward()
        counts = counter.counts
        counts.peak_bytes -= sum(2 * tensor.numel() for tensor in (hidden, weight) if tensor.requires_grad)
        return counts
