"""Holds the memory over the course of a training step, by what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .roofline.work import Work

WEIGHTS = "weights"
REFERENCE = "reference weights"
OPTIMIZER = "optimizer"
GRADIENTS = "gradients"
GATHERED = "gathered weights"
IMAGES = "images"
SAVED = "saved activations"
HEAD = "head"
ATTENTION = "attention"
KV_CACHE = "keys and values"
WORKSPACE = "workspace"
# In the order of tables and plots: what stays first.
KINDS = (WEIGHTS, REFERENCE, OPTIMIZER, GRADIENTS, GATHERED, IMAGES, SAVED, KV_CACHE, ATTENTION, HEAD, WORKSPACE)
MEANINGS = {
    WEIGHTS: "the model, adapters included",
    REFERENCE: "a reference or a teacher of its own",
    OPTIMIZER: "the optimizer's averages",
    GRADIENTS: "of the weights that train",
    GATHERED: "whole layers, while they are at work",
    IMAGES: "pixels of the batches that are there",
    SAVED: "what forward keeps for backward",
    KV_CACHE: "of the tokens sampled at a time",
    ATTENTION: "attention's working memory",
    HEAD: "hidden states to the loss and back",
    WORKSPACE: "the layer at work, other temporaries",
}

PROMPTS_STAGE = "generation, prompts"
GENERATION_STAGE = "generation, completions"
OLD_STAGE = "scores of the sampled completions"
REFERENCE_STAGE = "reference pass"
TEACHER_STAGE = "teacher's pass"
VALUES_STAGE = "values of the sampled completions"
FORWARD_STAGE = "forward"
HEAD_STAGE = "head and loss"
VALUE_FORWARD_STAGE = "value model forward"
VALUE_BACKWARD_STAGE = "value model backward"
LAST_LAYER, MIDDLE_LAYERS, FIRST_LAYER = "last layer backward", "layers backward", "first layer backward"
EMBEDDING_STAGE = "embedding backward"
OPTIMIZER_STAGE = "optimizer"
# Stages in which layers save what backward needs.
_SAVING = (FORWARD_STAGE, VALUE_FORWARD_STAGE)


@dataclass(slots=True)
class Allocation:
    """Records memory that operator number `start` took and operator `end` was the last to see (None: all saw it).

    stage: the one in which it was taken; kind: None where only the timeline tells.
    """

    size: int
    start: int
    stage: str | None
    kind: str | None = None
    end: int | None = None


@dataclass(frozen=True)
class Peak:
    """Holds the most memory that a stretch of a step takes: bytes by kind, and where that was."""

    parts: dict[str, float]
    stage: str
    operator: int = 0

    @property
    def bytes(self) -> int:
        return round(sum(self.parts.values()))


def highest(peaks: Mapping[str, Peak]) -> Peak:
    """Returns the highest of the stages' peaks."""
    return max(peaks.values(), key=lambda peak: peak.bytes)


@dataclass(frozen=True, eq=False)
class Timeline:
    """Holds the memory of each kind at each operator of a step: levels (kinds, operators) int64, in KINDS' order.

    stages: (name, first operator, last operator), the first of all operators being number 0; results: kind and bytes
    of what gradient checkpointing may keep, a list a layer (`modeling.selective_checkpointing.Budget`);
    default_budget: how many bytes of these it keeps where nothing is set; host_bytes: the most that offloading keeps
    in the host's memory; work: of each stage, where it was counted; image_work: the same of reading images.
    """

    levels: np.ndarray
    stages: tuple[tuple[str, int, int], ...]
    results: Sequence[Sequence[tuple[str, int]]] = ()
    default_budget: int = 0
    host_bytes: int = 0
    work: Mapping[str, Work] = field(default_factory=dict)
    image_work: Mapping[str, Work] = field(default_factory=dict)

    @classmethod
    def of(cls, allocations: Sequence[Allocation], stages: tuple[tuple[str, int, int], ...]) -> Timeline:
        """Makes a timeline of what a tracker recorded; stages by the tracker's numbers, which start anywhere."""
        first, last = stages[0][1], stages[-1][2]
        # What is allocated outside of every stage has None for a stage.
        forward_ends: dict[str | None, int] = {name: end for name, _, end in reversed(stages) if name in _SAVING}
        changes = np.zeros((len(KINDS), last - first + 2), dtype=np.int64)
        for item in allocations:
            end = last if item.end is None else min(item.end, last)
            if end < first:
                continue
            row = KINDS.index(_kind(item, end > forward_ends.get(item.stage, last)))
            changes[row, max(item.start - first, 0)] += item.size
            changes[row, end + 1 - first] -= item.size
        levels = changes.cumsum(axis=1)[:, :-1]
        return cls(levels, tuple((name, start - first, end - first) for name, start, end in stages))

    def at_start(self, stage: str) -> np.ndarray:
        """Returns the bytes of each kind (kinds,) when a stage begins."""
        return self.levels[:, next(start for name, start, _ in self.stages if name == stage)]

    def stage_peaks(self) -> dict[str, Peak]:
        """Returns the peak of each stage; stages of one name count as one."""
        total = self.levels.sum(axis=0)
        peaks: dict[str, Peak] = {}
        for name, start, end in self.stages:
            if end < start:
                continue
            at = start + int(total[start : end + 1].argmax())
            if name not in peaks or total[at] > peaks[name].bytes:
                peaks[name] = Peak(dict(zip(KINDS, self.levels[:, at].tolist(), strict=True)), name, at)
        return peaks

    def peak(self) -> Peak:
        """Returns the step's peak."""
        return highest(self.stage_peaks())


def _kind(item: Allocation, outlives_forward: bool) -> str:
    if item.kind in (None, ATTENTION) and item.stage in _SAVING and outlives_forward:
        return SAVED
    if item.kind is not None:
        return item.kind
    return HEAD if item.stage == HEAD_STAGE else WORKSPACE
