"""Computes distances between next-token distributions over two vocabularies: Universal Logit Distillation.

Tokens of different vocabularies have no names in common, or only some: what is compared is how likely the likeliest
token is, the second one, and so on (arXiv 2402.12030). A hybrid compares the tokens that both vocabularies have by
name, and only the others so.

A function here takes rows of probabilities, which need not sum to 1, and also returns the gradient: whoever calls it
has these rows for a moment only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

# Below it a probability counts as this much in a divergence, as in TRL.
SMALLEST_PROBABILITY = 1e-8


class RowDistances(NamedTuple):
    """Holds results of R rows: parts (K, R), the distances first, and their gradient (R, V) by the student."""

    parts: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class SortedDistance:
    """Compares the probabilities of the likeliest tokens, the second likeliest ones, and so on."""

    names: ClassVar[tuple[str, ...]] = ("distance",)

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> RowDistances:
        """Returns Σₖ |pₖ − qₖ| of sorted probabilities (R, V) and (R, V'); missing ones are 0."""
        distances, gradient = sorted_distance(student, teacher)
        return RowDistances(distances[None], gradient)


@dataclass(frozen=True)
class HybridDistance:
    """Compares the tokens of both vocabularies by name with a divergence, and the others in order of probability.

    student_ids, teacher_ids: (M,) int64, the same tokens in both vocabularies; student_rest, teacher_rest: all others;
    beta: of `named_divergence`; matched_weight, unmatched_weight: of the two parts.
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_rest: torch.Tensor
    teacher_rest: torch.Tensor
    beta: float
    matched_weight: float
    unmatched_weight: float

    names: ClassVar[tuple[str, ...]] = ("distance", "matched", "unmatched")

    @classmethod
    def of(
        cls,
        student_ids: torch.Tensor,
        teacher_ids: torch.Tensor,
        sizes: tuple[int, int],
        beta: float,
        weights: tuple[float, float] | None,
    ) -> HybridDistance:
        """Returns the distance of two heads of these sizes, of which ids (M,) are the same tokens.

        weights: of both parts; None takes the share of the teacher's tokens.
        """
        share = len(teacher_ids) / max(1, sizes[1])
        matched, unmatched = (share, 1 - share) if weights is None else weights
        rests = _rest(student_ids, sizes[0]), _rest(teacher_ids, sizes[1])
        return cls(student_ids, teacher_ids, rests[0], rests[1], beta, matched, unmatched)

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> RowDistances:
        """Returns the distances of probabilities (R, V) and (R, V'), and their two parts without weights."""
        gradient = torch.zeros_like(student)
        matched, found = named_divergence(student[:, self.student_ids], teacher[:, self.teacher_ids], self.beta)
        gradient[:, self.student_ids] = self.matched_weight * found
        unmatched = torch.zeros_like(matched)
        if len(self.student_rest) and len(self.teacher_rest):
            unmatched, found = sorted_distance(student[:, self.student_rest], teacher[:, self.teacher_rest])
            gradient[:, self.student_rest] = self.unmatched_weight * found
        whole = self.matched_weight * matched + self.unmatched_weight * unmatched
        return RowDistances(torch.stack([whole, matched, unmatched]), gradient)


def _rest(ids: torch.Tensor, size: int) -> torch.Tensor:
    """Returns all numbers below a size but those of `ids`."""
    is_rest = torch.ones(size, dtype=torch.bool, device=ids.device)
    is_rest[ids] = False
    return is_rest.nonzero().squeeze(1)


def sorted_distance(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns Σₖ |pₖ − qₖ| (R,) of sorted probabilities (R, V) and (R, V'), and its gradient (R, V)."""
    ordered, places = student.sort(dim=-1, descending=True)
    others = teacher.sort(dim=-1, descending=True).values
    common = min(student.shape[1], teacher.shape[1])
    ordered[:, :common] -= others[:, :common]
    distances = ordered.abs().sum(-1) + others[:, common:].abs().sum(-1)
    return distances, torch.empty_like(student).scatter_(1, places, ordered.sign_())


def named_divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the generalised Jensen-Shannon divergence (R,) of probabilities (R, M), and its gradient (R, M).

    beta: 0 is forward KL, 1 reverse KL. The rows' sums are left as they are.
    """
    p, q = (each.clamp_min(SMALLEST_PROBABILITY) for each in (student, teacher))
    if beta == 0:
        terms, gradient = q * (q.log() - p.log()), -q / p
    elif beta == 1:
        terms = p * (p.log() - q.log())
        gradient = p.log() - q.log() + 1
    else:
        mixture = ((1 - beta) * p + beta * q).log()
        own = p.log() - mixture
        terms, gradient = beta * q * (q.log() - mixture) + (1 - beta) * p * own, (1 - beta) * own
    return terms.sum(-1), gradient.masked_fill_(student < SMALLEST_PROBABILITY, 0.0)
