"""Estimates how long an optimizer step takes on a GPU of the table, from the work that a simulated one counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .memory_timeline import (
    FORWARD_STAGE,
    GENERATION_STAGE,
    OLD_STAGE,
    OPTIMIZER_STAGE,
    PROMPTS_STAGE,
    REFERENCE_STAGE,
    TEACHER_STAGE,
    VALUES_STAGE,
)
from .peak_estimates import counted_length, simulated, whole_layers
from .roofline.work import Work
from .shallow_models import shallow_models
from .sharding import sharing_of
from .training_setup import SAMPLING_TOGETHER, TrainingSetup
from .wire import Passes, Wire, wire_of, wire_work

# Passes over what was sampled, before updates learn from it.
_OF_A_ROLLOUT = (PROMPTS_STAGE, GENERATION_STAGE, OLD_STAGE, REFERENCE_STAGE, VALUES_STAGE)


def planned_wire(setup: TrainingSetup, max_length: int) -> Wire:
    """Counts what a rank sends over the wire in an optimizer step."""
    stages = _stages(setup, max_length)
    times = {stage: _times(stage, setup, max_length) for stage in stages}
    generations = times.get(PROMPTS_STAGE, 0)
    # The stage begins and ends at once where the scores are known.
    scored = times.get(REFERENCE_STAGE, 0) if setup.needs_reference else 0
    if (setup.scores_old_policy and OLD_STAGE in times) or setup.method == "ppo":
        scored += times.get(OLD_STAGE, 0)
    wire = wire_of(setup, max_length, Passes(times[FORWARD_STAGE], scored, generations))
    return wire + _wire_of_teacher(setup, max_length, times[TEACHER_STAGE]) if TEACHER_STAGE in times else wire


def _wire_of_teacher(setup: TrainingSetup, max_length: int, passes: float) -> Wire:
    """Counts what the passes of a teacher send, which does not train."""
    scoring, idle = (wire_of(setup.of_teacher, max_length, Passes(0, count)) for count in (passes, 0))
    return scoring - idle


def _stages(setup: TrainingSetup, max_length: int) -> list[str]:
    """Lists the stages of a step, by its shallowest simulation."""
    shallow = shallow_models(setup)
    layers = None if shallow is None else shallow.fewer
    return [name for name, *_ in simulated(setup, min(max_length, counted_length(setup)), layers).stages]


def planned_work(setup: TrainingSetup, max_length: int, limit: int | None) -> Work:
    """Counts the work of an optimizer step whose layers are left uncheckpointed as `limit` bytes of memory allow.

    Ranks that work on the same rows have their share of it each, in as many launches.
    """
    work = _compute_work(setup, max_length, limit)
    if setup.num_gpus == 1:
        return work
    if not sharing_of(setup).splits_batch:
        work = replace(work.times(1 / setup.num_gpus), launches=work.launches)
    return work + wire_work(planned_wire(setup, max_length), setup)


def _compute_work(setup: TrainingSetup, max_length: int, limit: int | None) -> Work:
    work = step_work(setup, max_length)
    if limit is not None and setup.leaves_whole_layers:
        whole, _ = whole_layers(setup, max_length, limit)
        if whole:
            plain = step_work(setup.without_checkpointing, max_length)
            share = whole / setup.num_layers
            work = work.mixed(plain, 1 - share, share)
    return work


def step_work(setup: TrainingSetup, max_length: int) -> Work:
    """Counts the work of an optimizer step with all its micro-batches; of PPO, of a rollout and its updates.

    Of layers that repeat two shallow models tell it, as they tell the peak. Of sequences longer than those that are
    counted (`counted_length`) all but attention and the update grows with the length; attention is counted as long as
    they are, be it in windows or not. Reading images takes what it takes.
    """
    counted = min(max_length, counted_length(setup))
    stages, images = (_work_by_stage(setup, counted, of_images=of_images) for of_images in (False, True))
    whole = stages if counted == max_length else _work_by_stage(setup, max_length)
    total = Work()
    for stage in {**stages, **images}:
        work = stages.get(stage, Work())
        if stage != OPTIMIZER_STAGE:
            work = work.times(max_length / counted)
            work = replace(work, attention_flops=whole.get(stage, Work()).attention_flops)
        total += (work + images.get(stage, Work())).times(_times(stage, setup, max_length))
    return total


def _times(stage: str, setup: TrainingSetup, max_length: int) -> float:
    """Returns how often an optimizer step runs a stage of the simulation."""
    micro_batches = setup.gradient_accumulation_steps
    completion = max(1, max_length - setup.prompt_tokens(max_length))
    if setup.method == "ppo":
        sampled = setup.completions_per_generation
        chunks = sampled / min(setup.local_rollout_forward_batch_size, sampled)
        updates = setup.num_ppo_epochs * setup.num_mini_batches
        if stage in _OF_A_ROLLOUT:
            return chunks * (completion if stage == GENERATION_STAGE else 1)
        return updates if stage == OPTIMIZER_STAGE else updates * micro_batches
    if stage == OPTIMIZER_STAGE:
        return 1
    if setup.method in ("online_dpo", "a2po") and stage == GENERATION_STAGE:
        return micro_batches * completion
    if setup.method not in SAMPLING_TOGETHER or stage not in _OF_A_ROLLOUT:
        return micro_batches
    if stage in (PROMPTS_STAGE, GENERATION_STAGE):
        steps = (setup.steps_per_generation or micro_batches) * setup.num_iterations
        generations = micro_batches / steps * (1.0 if setup.seq_kd else setup.lmbda)
        return generations * (completion if stage == GENERATION_STAGE else 1)
    return micro_batches / setup.num_iterations


def _work_by_stage(setup: TrainingSetup, max_length: int, *, of_images: bool = False) -> Mapping[str, Work]:
    def simulated_work(layers: int | None) -> Mapping[str, Work]:
        found = simulated(setup, max_length, layers)
        return found.image_work if of_images else found.work

    shallow = shallow_models(setup)
    if shallow is None:
        return simulated_work(None)
    fewer, deeper = (simulated_work(layers) for layers in (shallow.fewer, shallow.more))
    share = shallow.share(setup.num_layers)
    # The stage that only the deeper model has is all of its layer.
    return {stage: fewer.get(stage, Work()).mixed(work, 1 - share, share) for stage, work in deeper.items()}
