"""Lists the head's cases: sizes, modes, whose code, and the bounds that ours is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_fast.ops import linear_logprob, linear_token_loss
from trl_fast.ops.head.plan import default_workspace
from trl_fast.planning.gpu_facts import Gpu

from ..head_size import REFERENCE, Size
from .fake_devices import CUDA
from .fake_gpu import fake_gpu
from .operator_counter import Counter, Counts
from .triton_kernels import counted_kernels

SIZES = (
    Size(8192, 896, 151936),
    Size(8192, 2048, 151936),
    REFERENCE,
    Size(16384, 896, 151936),
    Size(16384, 4096, 151936),
    Size(8192, 4096, 128256),
    Size(8192, 2048, 262144),
)


@dataclass(frozen=True)
class Mode:
    """Tells which part of the head trains, through which op of ours, and the least passes over N·V·H."""

    passes: int
    by_token: bool
    hidden_trains: bool = True
    weight_trains: bool = True


MODES = {
    "scoring": Mode(1, by_token=False, hidden_trains=False, weight_trains=False),
    "frozen logprob": Mode(2, by_token=False, weight_trains=False),
    "frozen token": Mode(2, by_token=True, weight_trains=False),
    "trained token": Mode(3, by_token=True),
    "trained logprob": Mode(3, by_token=False),
}


class Bound(NamedTuple):
    """Bounds a case: ours is at most so many times the floor, TRL's at least so many times ours (None: not held)."""

    over_floor: float | None
    trl_over_ours: float | None


# At the reference size.
BOUNDS = {
    "scoring": Bound(1.01, 1.1),
    "frozen logprob": Bound(1.12, 1.45),
    "frozen token": Bound(1.12, 1.45),
    "trained token": Bound(1.12, 1.4),
    "trained logprob": Bound(1.12, 1.4),
}
# Of the workspace, at the reference size: what the head may take beyond its inputs and gradients.
PEAK_OVER_WORKSPACE = 1.05


def misses(cases: Iterable[HeadCase]) -> list[str]:
    """Tells where ours is beyond its bounds, in words."""
    found = []
    for case in cases:
        bound = BOUNDS[case.mode] if case.size == REFERENCE else Bound(None, None)
        least = bound.trl_over_ours or 1.0  # at every size
        if bound.over_floor is not None and case.over_floor > bound.over_floor:
            found.append(f"{case.name}: {case.over_floor:.2f} x the floor, at most {bound.over_floor}")
        if case.trl_over_ours < least:
            found.append(f"{case.name}: TRL takes {case.trl_over_ours:.2f} x ours, at least {least}")
        if case.ours.peak_bytes > PEAK_OVER_WORKSPACE * case.workspace_bytes:
            found.append(f"{case.name}: peak of {case.ours.peak_bytes} bytes, workspace of {case.workspace_bytes}")
    return found


@dataclass(frozen=True)
class HeadCase:
    """Holds ours and TRL's counts for a size and a mode; peak memory without the gradients handed back."""

    size: Size
    mode: str
    ours: Counts
    trl: Counts
    gpu: Gpu
    workspace_bytes: int

    @property
    def name(self) -> str:
        return f"{self.mode} at {self.size}"

    @property
    def passes(self) -> int:
        """Returns the passes over N·V·H, the least there can be."""
        return MODES[self.mode].passes

    @property
    def floor_flops(self) -> float:
        return 2.0 * self.passes * math.prod(self.size)

    @property
    def floor(self) -> float:
        """Returns milliseconds of the products that cannot be saved, an estimate as all of these."""
        return self.gpu.milliseconds(self.floor_flops, 0.0, 0.0)

    @property
    def our_milliseconds(self) -> float:
        return self.ours.milliseconds(self.gpu)

    @property
    def trl_milliseconds(self) -> float:
        return self.trl.milliseconds(self.gpu)

    @property
    def over_floor(self) -> float:
        return self.our_milliseconds / self.floor

    @property
    def trl_over_ours(self) -> float:
        return self.trl_milliseconds / self.our_milliseconds


def count_head(size: Size, mode: str, gpu: Gpu, workspace_bytes: int | None = None) -> HeadCase:
    """Counts a call of the head, forward and backward: bfloat16 hidden states and weight, log-probs alone.

    workspace_bytes: of ours; None: what it takes on such a GPU when all of its memory is free.
    """
    ours = _ours_by_token if MODES[mode].by_token else _ours
    if workspace_bytes is None:
        workspace_bytes = default_workspace(gpu.memory_bytes, gpu.memory_bytes)
    return HeadCase(
        size,
        mode,
        _count(size, MODES[mode], gpu, lambda *given: ours(*given, workspace_bytes)),
        _count(size, MODES[mode], gpu, _trl),
        gpu,
        workspace_bytes,
    )


def _count(size: Size, mode: Mode, gpu: Gpu, run: Callable[..., None]) -> Counts:
    counter = Counter()
    with fake_gpu(gpu, counter), counted_kernels(counter):
        bf16 = {"dtype": torch.bfloat16, "device": CUDA}
        hidden = torch.empty(size.rows, size.hidden, **bf16, requires_grad=mode.hidden_trains)
        weight = torch.empty(size.vocab, size.hidden, **bf16, requires_grad=mode.weight_trains)
        targets = torch.empty(size.rows, dtype=torch.int64, device=CUDA)
        upstream = torch.empty(size.rows, device=CUDA)
        counter.start()
        run(hidden, weight, targets, upstream)
        counts = counter.counts
        counts.peak_bytes -= sum(2 * tensor.numel() for tensor in (hidden, weight) if tensor.requires_grad)
        return counts


def _ours(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, workspace: int
) -> None:
    logprobs = linear_logprob(hidden, weight, targets, backend="cuda", workspace_bytes=workspace).logprobs
    _finish(logprobs, upstream)


def _ours_by_token(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, workspace: int
) -> None:
    linear_token_loss(
        *(hidden, weight, targets),
        lambda scores, rows: (scores.logprobs * upstream[rows]).sum(),
        backend="cuda",
        workspace_bytes=workspace,
    ).loss.backward()


def _trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> None:
    given = (hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    _finish(ChunkedLogProbFunction.apply(*given)[0], upstream)


def _finish(logprobs: torch.Tensor, upstream: torch.Tensor) -> None:
    if logprobs.requires_grad:
        logprobs.backward(upstream)
