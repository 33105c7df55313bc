"""Makes the completions that a student learns from: its own, its teacher's, and those of the dataset."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trl_fast.data.prompt_completion import COMPLETION_IDS
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import Rollout, ToolRollout, TransformersEngine
from trl_fast.rollout.samples import Samples
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from ..online.sampling import suppressed_tokens


class Mixture:
    """Makes samples of a trainer's rows, lmbda of the micro-batches by its student.

    Which ones is drawn anew for each optimizer step, by its number and the seed: alike in all processes, which
    generate together, and in a run that goes on from a checkpoint.

    Args:
        trainer: a `DistillationTrainer`, with its loop, slicer and arguments.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._teacher = _sampling_from_teacher(trainer) if trainer.args.seq_kd else None

    def drawn(self, step: int) -> list[bool]:
        """Returns of each micro-batch of an optimizer step whether its completions are the student's."""
        args = self._trainer.args
        draw = random.Random(f"{args.seed} {step}")
        return [draw.random() < args.lmbda for _ in range(args.steps_per_generation)]

    def slices(self, rows: list[dict[str, Any]], step: int) -> list[Samples]:
        """Returns the micro-batches of an optimizer step, from this process's rows of a generation."""
        args, own = self._trainer.args, self.drawn(step)
        size, count = args.per_device_train_batch_size, len(own)
        samples = self.samples(rows, [of_student for of_student in own for _ in range(size)])
        if any(own) and not all(own):
            # Which micro-batch is the student's is drawn; within one, order means nothing.
            return [samples.select(range(start, start + size)) for start in range(0, size * count, size)]
        together = args.num_generations > 1 and BATCH_LAYOUTS[self._trainer.updates.layout].shares_prompts
        chosen = self._trainer.slicer.slices_of(samples, size, count, together=together)
        return [samples.select(indices) for indices in chosen]

    def samples(self, rows: list[dict[str, Any]], own: Sequence[bool]) -> Samples:
        """Returns a completion of each row, by the student where `own` says so, and records their lengths.

        Raises:
            ValueError, RuntimeError: as in `RolloutLoop.generate`.
        """
        loop, trainer = self._trainer.loop, self._trainer
        with trainer.rescue.guard():
            rows = loop.shown(rows)
            rollout = self._rollout(rows, own)
        samples = loop.samples_of(rollout, trainer)
        loop.metrics.keep_completions([row["prompt"] for row in rows], rollout.completions)
        return samples

    def _rollout(self, rows: list[dict[str, Any]], own: Sequence[bool]) -> Rollout:
        loop, parts = self._trainer.loop, {}
        for of_student in sorted(set(own), reverse=True):
            chosen = [row for row, its in zip(rows, own, strict=True) if its == of_student]
            found = loop.generate(self._cut(chosen), self._trainer)[0] if of_student else self._given(chosen)
            found.completions = loop.reader.read([row["prompt"] for row in chosen], found)
            parts[of_student] = found
        return merged(parts[True], parts[False], own) if len(parts) == 2 else parts[own[0]]

    def _cut(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns rows with as much of their prompts as the arguments allow where completions are sampled."""
        limit, has_images = self._trainer.args.prompt_limit, self._trainer.images is not None
        if limit is None:
            return rows
        longest = max(len(row[PROMPT_IDS]) for row in rows)
        if has_images and longest > limit:
            raise ValueError(
                f"max_length={self._trainer.args.max_length}: a prompt with images has {longest} tokens, which are "
                f"not cut, and only {limit} are left before a sampled completion; raise max_length, or set it to None"
            )
        return [{**row, PROMPT_IDS: list(row[PROMPT_IDS])[-limit:]} for row in rows]

    def _given(self, rows: list[dict[str, Any]]) -> Rollout:
        """Returns the completions of rows that the student does not sample: the teacher's or the dataset's."""
        trainer = self._trainer
        rows = rows if self._teacher is None else self._cut(rows)
        prompts = [list(row[PROMPT_IDS]) for row in rows]
        images = (
            None if trainer.rollout_images is None else trainer.rollout_images.of_prompts([r["prompt"] for r in rows])
        )
        if self._teacher is None:
            return Rollout(prompts, [list(row[COMPLETION_IDS]) for row in rows], images=images)
        settings = trainer.args.sampling_settings()
        given = {} if images is None else {"images": images}
        with trainer.accelerator.autocast():
            found = self._teacher.generate(prompts, settings, **given)
        return Rollout(prompts, found.completion_ids, images=images)


@contextmanager
def _whole(teacher: torch.nn.Module) -> Iterator[bool]:
    """Enters a context in which a teacher's weights are whole, so that processes need not generate together."""
    with gathered(teacher):
        yield False


def _sampling_from_teacher(trainer: Any) -> TransformersEngine:
    """Returns an engine that samples from a trainer's teacher as its student's does."""
    teacher = trainer.teacher_model
    return TransformersEngine(
        *(lambda: trainer.accelerator.unwrap_model(teacher), trainer.end_ids, trainer.tokenizer.pad_token_id),
        trainer.tokenizer,
        gathered_weights=lambda: _whole(teacher),
        image_layout=trainer.images and trainer.images.layout,
        suppressed=suppressed_tokens(trainer),
    )


def merged(first: Rollout, second: Rollout, of_first: Sequence[bool]) -> Rollout:
    """Returns the completions of two rollouts in one.

    of_first: of each completion, in order, whether it is the next one of the first rollout, or of the second.
    """
    parts = {True: iter(range(len(first.prompt_ids))), False: iter(range(len(second.prompt_ids)))}
    places = [(first if chosen else second, next(parts[chosen])) for chosen in of_first]

    def joined(name: str, missing: Any = None) -> list | None:
        values = [getattr(rollout, name) for rollout in (first, second)]
        if values == [None, None]:
            return None
        return [missing(rollout, i) if (own := getattr(rollout, name)) is None else own[i] for rollout, i in places]

    fields: dict[str, Any] = {
        **{name: joined(name) for name in ("prompt_ids", "completion_ids", "completions")},
        "mask": joined("mask", lambda rollout, index: [1] * len(rollout.completion_ids[index])),
        "images": joined("images", lambda rollout, index: ()),
        "completion_images": joined("completion_images", lambda rollout, index: ()),
    }
    if isinstance(first, ToolRollout):
        return ToolRollout(**fields, calls=first.calls, failures=first.failures)
    return Rollout(**fields)
