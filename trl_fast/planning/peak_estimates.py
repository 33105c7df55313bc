"""Estimates a step's peak from two shallow models, and the longest sequences that fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trl_fast.modeling.selective_checkpointing import PRODUCT, Budget
from trl_fast.modeling.uncheckpointed_layers import layers_that_fit, room_for_layers

from .memory_timeline import (
    EMBEDDING_STAGE,
    FORWARD_STAGE,
    GRADIENTS,
    HEAD_STAGE,
    IMAGES,
    KINDS,
    LAST_LAYER,
    OPTIMIZER,
    OPTIMIZER_STAGE,
    REFERENCE,
    SAVED,
    WEIGHTS,
    Peak,
    Timeline,
    highest,
)
from .shallow_models import ShallowModels, shallow_models
from .sharding import sharded
from .simulated_step import simulate
from .training_setup import TrainingSetup

# Of longer micro-batches only the work of attention is counted.
COUNTED_TOKENS = 16384
# How far below the longest that fits the answer may be.
TOLERANCE = 0.01
# Lengths are multiples of this, and longer ones than the last are not looked at.
LENGTH_STEP, LONGEST = 64, 1 << 22
_UNLIMITED = 1 << 60
# What is there whatever the length.
RESIDENT = (WEIGHTS, REFERENCE, OPTIMIZER, GRADIENTS, IMAGES)

StagePeaks = dict[str, Peak]


def stage_peaks(setup: TrainingSetup, max_length: int) -> StagePeaks:
    """Finds the peak of each stage of a step on one of the setup's devices, as `simulate` does in much more time."""
    return sharded(_stage_peaks(setup, max_length), setup)


def _stage_peaks(setup: TrainingSetup, max_length: int) -> StagePeaks:
    """Finds the peaks on a device that holds everything.

    Layers repeat, so the most memory in each stage of a step is a straight line over their number: two shallow
    models tell it. They keep all results that gradient checkpointing may keep; what the budget has no room for in the
    whole model is then taken off. A model whose layers do not repeat is simulated whole, and so are two with a budget
    each.
    """
    depth, limit = setup.num_layers, setup.activation_budget
    two_budgets = setup.method == "ppo" and limit != 0
    shallow = None if two_budgets else shallow_models(setup)
    if shallow is None:
        return simulated(setup, max_length).stage_peaks()
    roomy = setup.but(activation_budget_bytes=_UNLIMITED) if limit != 0 else setup
    one, two = (simulated(roomy, max_length, layers) for layers in (shallow.fewer, shallow.more))
    fewer, more = one.stage_peaks(), two.stage_peaks()
    # A stage that only the deeper model has lies between two others and is never above both.
    peaks = {stage: _on_line(fewer[stage], more[stage], shallow.share(depth)) for stage in more if stage in fewer}
    if limit != 0:
        limit = two.default_budget if limit is None else limit
        _take_off_what_has_no_room(peaks, _results(two.results, shallow, depth), limit)
    return peaks


def _results(
    found: Sequence[Sequence[tuple[str, int]]], shallow: ShallowModels, depth: int
) -> list[Sequence[tuple[str, int]]]:
    """Returns kind and bytes of the results of each layer of the whole model that may be kept."""
    if shallow.repeated == 1:
        # The layer between is like all the others in a deep model, which the last one is not.
        return [found[1]] * depth
    return [found[shallow.like(layer)] for layer in range(depth)]


@functools.lru_cache(maxsize=128)
def simulated(setup: TrainingSetup, max_length: int, layers: int | None = None) -> Timeline:
    """Simulates a step, and remembers the last ones: several questions are asked about the same, its work too."""
    counts = setup.device == "gpu" and max_length <= counted_length(setup)
    return simulate(setup, max_length, layers, counts_work=counts)


def counted_length(setup: TrainingSetup) -> int:
    """Returns the longest sequences whose work is all counted: longer ones would take long."""
    sequences = setup.per_device_train_batch_size * (2 if setup.method == "kto" else setup.completions_of_a_row)
    return max(setup.image_tokens + LENGTH_STEP, COUNTED_TOKENS // sequences)


def _take_off_what_has_no_room(peaks: StagePeaks, results: Sequence[Sequence[tuple[str, int]]], limit: int) -> None:
    """Takes from the peaks of a model that keeps all results of its layers those that a budget has no room for."""
    kept_and_all = zip(_kept(results, limit), _kept(results, _UNLIMITED), strict=True)
    missing = [every - kept for kept, every in kept_and_all]
    # The layer at work has its results, kept or computed again.
    surplus = {FORWARD_STAGE: sum(missing[:-1]), HEAD_STAGE: sum(missing), LAST_LAYER: sum(missing[:-1])}
    for stage in surplus.keys() & peaks.keys():
        peaks[stage].parts[SAVED] -= surplus[stage]


def _kept(results: Sequence[Sequence[tuple[str, int]]], limit: int) -> list[int]:
    """Returns the bytes that each layer keeps of its results, of these kinds and sizes."""
    budget, left, kept = Budget(limit, len(results)), limit, []
    for of_layer in results:
        budget.start_layer()
        taken = [budget.take(kind, size) for kind, size in of_layer]
        if taken and of_layer[-1][0] == PRODUCT and taken[-1]:
            budget.give_back(of_layer[-1][1])
        kept.append(left - budget.left)
        left = budget.left
    return kept


def estimate(setup: TrainingSetup, max_length: int) -> Peak:
    """Returns the peak of a step, from `stage_peaks`."""
    return highest(stage_peaks(setup, max_length))


def whole_layers(setup: TrainingSetup, max_length: int, limit: int) -> tuple[int, int]:
    """Counts the layers that a GPU of `limit` bytes leaves uncheckpointed, and the bytes that they save."""
    if not setup.leaves_whole_layers:
        return 0, 0
    # When these begin, nothing is left of what layers saved.
    over = (EMBEDDING_STAGE, OPTIMIZER_STAGE)
    passing = {name: peak for name, peak in stage_peaks(setup, max_length).items() if name not in over}
    room = room_for_layers(limit, limit, highest(passing).bytes, setup.activation_budget_bytes)
    size = _saved_by_a_layer(setup, max_length)
    whole = layers_that_fit([size] * setup.num_layers, room)
    return whole, whole * size


def _saved_by_a_layer(setup: TrainingSetup, max_length: int) -> int:
    """Counts the bytes that a layer saves beyond those when it is checkpointed; the mean of layers that differ."""
    shallow = shallow_models(setup)
    if shallow is None:
        return math.ceil(_saved_by(setup, max_length, setup.num_layers) / setup.num_layers)
    saved = _saved_by(setup, max_length, shallow.more) - _saved_by(setup, max_length, shallow.fewer)
    return math.ceil(saved / shallow.repeated)


def _saved_by(setup: TrainingSetup, max_length: int, layers: int) -> int:
    steps = (simulated(one, max_length, layers) for one in (setup.without_checkpointing, setup))
    plain, checkpointed = (int(step.at_start(LAST_LAYER)[KINDS.index(SAVED)]) for step in steps)
    return plain - checkpointed


def _on_line(one: Peak, two: Peak, share: float) -> Peak:
    return Peak({kind: one.parts[kind] + share * (two.parts[kind] - one.parts[kind]) for kind in KINDS}, two.stage)


@dataclass(frozen=True)
class Longest:
    """Holds the longest max_length that fits, in tokens, and its peak; 0 if none does."""

    max_length: int
    peak: Peak | None

    @property
    def at_least(self) -> bool:
        """Tells whether the search stopped there, and longer ones may fit."""
        return self.max_length == LONGEST


def longest_context(
    setup: TrainingSetup, limit: int, start: int, peaks_of: Callable[[TrainingSetup, int], StagePeaks] = stage_peaks
) -> Longest:
    """Returns the longest max_length whose step takes at most `limit` bytes, to within TOLERANCE.

    In each stage memory is close to a straight line over the length. The next length to try is where the first of the
    lines through the last two meets the limit. `start`: a length to begin with.
    """
    tried: dict[int, StagePeaks] = {}
    # The images, and tokens beside them.
    shortest = LENGTH_STEP * (1 + -(-setup.image_tokens // LENGTH_STEP))
    length = _rounded(start, shortest)
    while length not in tried:
        tried[length] = peaks_of(setup, length)
        fits, exceeds = _bounds(tried, limit)
        meets = _meeting(tried, limit) if len(tried) > 1 else _proportional(tried[length], length, limit)
        if len(tried) > 1 and fits >= min(meets * (1 - TOLERANCE), LONGEST):
            break
        # On the safe side by half the tolerance, and where the lines mislead, between what fits and what does not.
        length = _rounded(meets * (1 - TOLERANCE / 2), shortest)
        if not fits < length < exceeds:
            length = _rounded((fits + exceeds) / 2 if exceeds < math.inf else 2 * fits, shortest)
    return Longest(fits, highest(tried[fits]) if fits else None)


def _rounded(length: float, shortest: int) -> int:
    return int(min(LONGEST, max(shortest, length // LENGTH_STEP * LENGTH_STEP)))


def _bounds(tried: dict[int, StagePeaks], limit: int) -> tuple[int, float]:
    """Finds the longest length that fits, 0 if none does, and the shortest that does not."""
    fit = [length for length, peaks in tried.items() if highest(peaks).bytes <= limit]
    return max(fit, default=0), min((length for length in tried if length not in fit), default=math.inf)


def _proportional(peaks: StagePeaks, length: int, limit: int) -> float:
    """Guesses where a peak meets the limit, whose parts grow with the length but for what is resident."""
    peak = highest(peaks)
    resident = sum(peak.parts[kind] for kind in RESIDENT)
    grows = max(peak.bytes - resident, 1)
    guess = length * min(max((limit - resident) / grows, 1 / 16), 16)
    # A second length that differs, for a line through both.
    return guess if not 0.8 < guess / length < 1.25 else length * (2 if guess >= length else 0.5)


def _meeting(tried: dict[int, StagePeaks], limit: int) -> float:
    """Finds where the first of the stages' lines through the two lengths nearest to the limit meets it."""
    one, two = sorted(tried, key=lambda length: abs(highest(tried[length]).bytes - limit))[:2]
    meets = math.inf
    for stage, peak in tried[one].items():
        bytes_per_token = (tried[two][stage].bytes - peak.bytes) / (two - one)
        if bytes_per_token > 0:
            meets = min(meets, one + (limit - peak.bytes) / bytes_per_token)
    return min(max(meets, 0.0), 2 * LONGEST)
