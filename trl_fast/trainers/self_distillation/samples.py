"""Holds completions that a teacher reads after a prompt of its own, and makes the micro-batches of their update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_fast.data import TokenBatch
from trl_fast.data.device_transfer import copy_to_device
from trl_fast.losses.self_distillation import mean_weights
from trl_fast.rollout.samples import Samples

from ..online.micro_batches import UpdateMaker
from .step import SelfDistillationUpdate


@dataclass
class TaughtSamples(Samples):
    """Holds S completions with the teacher's prompts.

    - `teacher_prompt_ids`: token ids by completion; None until they are known.
    - `untaught` (S,) bool: completions of which nothing is learned from the teacher; None: there are none.
    """

    teacher_prompt_ids: list[list[int]] | None = None
    untaught: torch.Tensor | None = None

    def by_beginning(self, indices: Iterable[int]) -> list[int]:
        """Returns `indices` as the base does, with those next to each other that share the teacher's prompt too."""
        taught = self.of_teacher().prompt_ids

        def beginning(index: int) -> tuple[Any, ...]:
            return *self.prompt(index), taught[index], self.completion_ids[index]

        return sorted(indices, key=beginning)

    def of_teacher(self) -> TaughtSamples:
        """Returns the same completions after the teacher's prompts."""
        assert self.teacher_prompt_ids is not None, "they are made with the samples"
        return replace(self, prompt_ids=self.teacher_prompt_ids)

    @property
    def learned(self) -> torch.Tensor:
        """Says of which completions something is learned from the teacher, (S,) bool."""
        return ~self.excluded if self.untaught is None else ~(self.excluded | self.untaught)


def taught_update(
    maker: UpdateMaker,
    samples: TaughtSamples,
    kept: Iterable[int],
    *,
    loss_divisor: int,
    skipped_tokens: int = 0,
    batch: TokenBatch | None = None,
) -> SelfDistillationUpdate:
    """Returns the update of the completions `kept` of a micro-batch, in the order of `by_beginning`.

    The loss is the mean over all completions of their means over tokens.

    loss_divisor: accumulation steps that the loss is divided by; skipped_tokens: first tokens that do not count;
    batch: these completions after the student's prompts, where it is there already.
    """
    part = samples.select(samples.by_beginning(kept))
    batch, device = batch or maker.token_batch(part), maker.device
    mask, old = part.flat("mask"), part.flat("old_logprobs")
    counts = (batch.offset >= skipped_tokens).float()
    counts = counts * copy_to_device(part.learned.float(), device)[batch.branch]
    if mask is not None:
        counts = counts * copy_to_device(mask, device)
    told = _of_teacher(part)
    return SelfDistillationUpdate(
        batch=batch,
        teacher_batch=maker.token_batch(part.select(told).of_teacher()),
        taught=None if len(told) == len(part) else copy_to_device(part.places_of(told), device),
        counts=counts,
        weights=mean_weights(counts, batch.branch, len(part), len(samples)) / loss_divisor,
        old_logprobs=None if old is None else copy_to_device(old, device),
    )


def _of_teacher(part: TaughtSamples) -> list[int]:
    """Returns the numbers of the completions that the teacher reads: those that are learned, at least one."""
    learned = part.learned.nonzero().flatten().tolist()
    return learned or [min(range(len(part)), key=lambda index: len(part.completion_ids[index]))]
