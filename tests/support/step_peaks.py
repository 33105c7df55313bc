"""Measures the peak of memory of a trainer's step on this CPU, and simulates it."""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.memory import measure_peak
from trl_fast.planning.memory_timeline import IMAGES, KINDS, OPTIMIZER, REFERENCE, WEIGHTS
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup

# What is there before a step and after it.
RESIDENT = (WEIGHTS, REFERENCE, OPTIMIZER, IMAGES)


def peak_of_a_step(trainer: Any, batch: Any, setup: TrainingSetup) -> int:
    """Bytes of tensors at the peak of the second step, beyond those that live before it and what products take."""
    trainer.create_optimizer()
    model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model).train()
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.training_step(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step()
    gc.collect()
    return measure_peak(step).bytes_beside_products


def simulated_peak(setup: TrainingSetup, length: int) -> float:
    """Bytes at the peak beyond those that live before a step."""
    timeline = simulate(setup, length)
    return timeline.peak().bytes - sum(timeline.levels[KINDS.index(kind)].max() for kind in RESIDENT)
