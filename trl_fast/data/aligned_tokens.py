"""Finds what tokens of two tokenizers stand for the same piece of a text, and which rows of two models are compared.

A span is a piece of a completion between two places where both tokenizers end a token. Where one of them has several
tokens for it, its probabilities are those of one of the tokens times the probability of each other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .device_transfer import copy_to_device

Span = tuple[range, range]


@dataclass(frozen=True)
class SpanRows:
    """Holds which rows of a model that was read at N places make G spans, all (·,) int64.

    - `bases` (G,): the row of each span whose probabilities are compared.
    - `others` (S,): rows of which the probability of one token is multiplied in; `tokens` (S,): that token; `spans`
      (S,): the span.
    """

    bases: torch.Tensor
    others: torch.Tensor
    tokens: torch.Tensor
    spans: torch.Tensor

    def to(self, device: torch.device) -> SpanRows:
        """Returns the same on a device."""
        return SpanRows(*(copy_to_device(each, device) for each in (self.bases, self.others, self.tokens, self.spans)))


class Completion(NamedTuple):
    """Holds a completion for one model: its tokens, how many of them are compared, and where each ends in its text."""

    ids: Sequence[int]
    compared: int
    ends: Sequence[int]


def aligned_spans(ends: Sequence[int], other_ends: Sequence[int]) -> list[Span]:
    """Returns the tokens of each span, from where tokens of two tokenizers end in the same text.

    What is left where one of them comes to its end is one span more, if both have tokens there.
    """
    found: list[Span] = []
    first, last, place = [0, 0], [len(ends), len(other_ends)], [0, 0]
    while place[0] < last[0] and place[1] < last[1]:
        own, other = ends[place[0]], other_ends[place[1]]
        place = [place[0] + (own <= other), place[1] + (other <= own)]
        if own == other:
            found.append((range(first[0], place[0]), range(first[1], place[1])))
            first = place
    rest = (range(first[0], last[0]), range(first[1], last[1]))
    return [*found, rest] if all(rest) else found


def positional_spans(count: int, other_count: int) -> list[Span]:
    """Returns a span for each token that both have, the first with the first and so on."""
    return [(range(place, place + 1), range(place, place + 1)) for place in range(min(count, other_count))]


def spans_of(student: Completion, teacher: Completion, *, by_text: bool) -> list[Span]:
    """Returns the spans of a completion, of the tokens that are compared: by their text, or by position."""
    if not by_text:
        return positional_spans(max(student.compared, 0), max(teacher.compared, 0))
    return aligned_spans(student.ends[: max(student.compared, 0)], teacher.ends[: max(teacher.compared, 0)])


def span_rows(
    completions: Sequence[Sequence[int]], groups: Sequence[Sequence[range]], *, lengths: Sequence[int], after: bool
) -> SpanRows:
    """Returns the rows of one model that make the spans of several completions.

    Args:
        completions: their tokens; groups: of each the tokens of its spans.
        lengths: rows that the model was read at for each completion: those that predict its tokens, in order, and with
            `after` one more behind the last token.
        after: whether the row behind a token stands for it, and the first token of a span is compared (TRL's
            "observed"). Else it is the row that predicts the token, and the last one is compared ("bayesian").
    """
    bases: list[int] = []
    others: list[int] = []
    tokens: list[int] = []
    spans: list[int] = []
    start = 1 if after else 0
    for ids, own, length in zip(completions, groups, lengths, strict=True):
        for group in own:
            base = group[0] if after else group[-1]
            rest = [token for token in group if token != base]
            others += [start + token for token in rest]
            tokens += [ids[token] for token in rest]
            spans += [len(bases)] * len(rest)
            bases.append(start + base)
        start += length
    return SpanRows(*(torch.tensor(each, dtype=torch.int64) for each in (bases, others, tokens, spans)))


def shared_tokens(
    student: Mapping[str, int], teacher: Mapping[str, int], sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids, (M,) int64 for the student and the teacher, of the tokens that both vocabularies have.

    sizes: ids from there on have no column in the head.
    """
    found = sorted((index, student[token]) for token, index in teacher.items() if token in student)
    kept = [(own, index) for index, own in found if own < sizes[0] and index < sizes[1]]
    own, others = zip(*kept, strict=True) if kept else ((), ())
    return torch.tensor(own, dtype=torch.int64), torch.tensor(others, dtype=torch.int64)
