"""Turns samples into micro-batches of the update: token batches, and vectors beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from trl_fast.data import TokenBatch
from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.images.layout import ImageLayout
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.parallel.agreement import largest_over_ranks
from trl_fast.rollout.samples import Samples
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS


@dataclass
class Update:
    """Holds a micro-batch of the update: tokens to score, what the loss reads, and what has no gradient.

    left_out: (B − S,) float32, the lengths of the completions that are not in the batch; lengths: of the S that are.
    """

    batch: TokenBatch
    loss_inputs: PolicyLossInputs
    left_out: torch.Tensor
    lengths: tuple[int, ...]

    def group_sizes(self, scope: str) -> tuple[int, ...] | None:
        """Returns how many tokens the head has to see together before a loss of this scope knows each one's weight."""
        sizes = {"token": None, "sequence": self.lengths}
        return sizes[scope] if scope in sizes else (len(self.batch.targets),)


@dataclass(frozen=True)
class UpdateMaker:
    """Lays samples out for a model: its batch layout, its tokenizer's padding, its device, its way with images."""

    layout: str
    pad_token_id: int
    pad_to_multiple_of: int | None
    device: torch.device
    image_layout: ImageLayout | None = None

    def token_batch(self, samples: Samples) -> TokenBatch:
        """Returns the batch that scores every completion token of the samples."""
        multiple = BATCH_LAYOUTS[self.layout].padding_multiple(self.pad_to_multiple_of)
        return samples.batch(self.layout, self.pad_token_id, multiple, self.image_layout).to(self.device)

    @torch.no_grad()
    def score(
        self, samples: Samples, score: Callable[[TokenBatch], torch.Tensor], batches: list[list[int]]
    ) -> list[torch.Tensor]:
        """Computes what `score` says about the tokens of the completions of each batch; zeros for all others.

        All processes call this together, and make equal numbers of forwards: who has fewer batches repeats one.

        score: from a batch to values (N,). Returns float32 vectors on the CPU, one a completion.
        """
        found = [torch.zeros(len(ids)) for ids in samples.completion_ids]
        batches = batches + [min(batches, key=len)] * (largest_over_ranks(len(batches)) - len(batches))
        for chunk in batches:
            part = samples.select(chunk)
            values = part.split(score(self.token_batch(part)).float().cpu())
            for index, value in zip(chunk, values, strict=True):
                found[index] = value
        return found

    def update(self, samples: Samples, kept: list[int], weights: torch.Tensor) -> Update:
        """Returns the update of the completions `kept`.

        weights: (B,) float32, the weight in the loss of a token of each completion.
        """
        order = samples.by_beginning(kept)
        part = samples.select(order)
        batch = self.token_batch(part)
        lengths = tuple(len(ids) for ids in part.completion_ids)
        vectors = part.flat_fields()
        if part.excluded.any():
            counts = torch.ones(len(batch.targets)) if vectors["mask"] is None else vectors["mask"]
            vectors["mask"] = counts * ~part.excluded.repeat_interleave(torch.tensor(lengths))
        loss_inputs = PolicyLossInputs(
            branch=batch.branch,
            advantages=copy_to_device(part.advantages, self.device),
            weights=copy_to_device(weights[order], self.device),
            **{name: None if value is None else copy_to_device(value, self.device) for name, value in vectors.items()},
        )
        left_out = sorted(set(range(len(samples))) - set(kept))
        return Update(batch, loss_inputs, copy_to_device(samples.lengths[left_out], self.device), lengths)


def slice_indices(samples: Samples, slices: int, *, together: bool, shuffled: bool = True) -> list[list[int]]:
    """Returns the numbers of the completions, cut into `slices` equal parts.

    together: whether completions of one prompt stay next to each other; shuffled: whether they are drawn at random.
    """
    order = torch.randperm(len(samples)).tolist() if shuffled else list(range(len(samples)))
    if together:
        order = samples.grouped(order)
    size = len(order) // slices
    return [order[start : start + size] for start in range(0, len(order), size)]


class Slicer:
    """Draws once, before any is scored, which completions of a generation share a micro-batch of the update.

    shuffles: whether they are drawn at random, or taken in turn.
    """

    def __init__(self, *, shuffles: bool = True) -> None:
        self._shuffles = shuffles
        self._drawn: tuple[Samples | None, list[list[int]]] = (None, [])

    def keep(self, samples: Samples, slices: list[list[int]]) -> None:
        """Makes these the micro-batches of the samples."""
        self._drawn = (samples, slices)

    def slices_of(self, samples: Samples, size: int, slices: int | None, *, together: bool) -> list[list[int]]:
        """Returns the numbers of the completions of each micro-batch: the same again for the same samples.

        They are drawn by `slice_indices`, unless they are not for an update of `slices` micro-batches of `size`.
        """
        if slices is None or len(samples) != size * slices:
            return batches_in_turn(samples, range(len(samples)), size)
        known, drawn = self._drawn
        if known is not samples:
            drawn = slice_indices(samples, slices, together=together, shuffled=self._shuffles)
            self._drawn = (samples, drawn)
        return drawn


def batches_in_turn(samples: Samples, indices: Iterable[int], size: int) -> list[list[int]]:
    """Returns the numbers `indices` of completions in batches of at most `size`, those of one prompt together."""
    order = samples.by_beginning(indices)
    return [order[start : start + size] for start in range(0, len(order), size)]


def scoring_batches(
    samples: Samples, slices: list[list[int]], trained: Callable[[Samples], list[int]], size: int, *, everyone: bool
) -> list[list[int]]:
    """Returns the batches in which completions are scored before the update.

    Those that are trained are in the update's own batches: a row's log-probs depend, in the last bits, on the rows
    beside it. trained: returns the numbers of a slice's completions that are. everyone: whether the others are scored
    too, `size` at a time.
    """
    batches = []
    for chosen in slices:
        part = samples.select(chosen)
        batches.append([chosen[index] for index in part.by_beginning(trained(part))])
    if everyone:
        others = set(range(len(samples))).difference(*batches)
        batches += batches_in_turn(samples, sorted(others), size)
    return batches


def trained_indices(samples: Samples, *, everyone: bool) -> list[int]:
    """Returns the numbers of the completions that have a gradient.

    There is at least one, so that there always is a loss to differentiate. everyone: whether also completions without
    advantage have a gradient.
    """
    kept = [
        index
        for index, advantage in enumerate(samples.advantages)
        if not samples.excluded[index] and (everyone or advantage != 0)
    ]
    lengths = [len(ids) for ids in samples.completion_ids]
    return kept or [lengths.index(min(lengths))]
