"""Reads how far a student's next-token probabilities lie from those of a teacher with another tokenizer.

Both were read at places of their own (`data.aligned_tokens`). As in `distillation`, the teacher's head is read when
the student's is, and no logit of either is kept. Where a head is not understood, both models give logits of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from trl_fast.data.aligned_tokens import SpanRows
from trl_fast.ops import HeadOptions, selective_log_softmax
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.linear_distance import (
    Distance,
    DistanceHead,
    DistanceLoss,
    linear_distance,
    logit_distance,
    row_bytes,
)
from trl_fast.ops.linear_logprob import token_logprobs
from trl_fast.ops.linear_token_loss import token_loss_of_head
from trl_fast.ops.token_scores import required

from .distillation import TeacherStates, TwoHeads
from .lm_head import HeadParameters, head_transform
from .scoring import DEFAULT_HEAD, call_head

# Below it a token's probability counts as this much in that of its span, as in TRL.
_SMALLEST = math.log(1e-8)
# Rows of spans that a workspace has room for where its size is not given.
_LEAST_ROWS = 16


class SpanLoss(NamedTuple):
    """Holds the loss, 0-d and differentiable, and without gradient the parts (K, G) of the spans' distances."""

    loss: torch.Tensor
    parts: torch.Tensor


@dataclass(frozen=True)
class SpanComparison:
    """Holds what is compared, all of it on the models' device.

    - `student`, `teacher`: rows of G spans; `weights` (G,) float32, of the spans in the loss.
    - `distance`: compares rows of probabilities; `temperature`, `teacher_temperature` divide the logits.
    - `target_rows`, `targets` (M,): places of the student and the tokens that it predicts there, whose likelihood is
      learned too with `target_weight`; None: none is.
    """

    student: SpanRows
    teacher: SpanRows
    weights: torch.Tensor
    distance: Distance
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    target_rows: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    target_weight: float = 0.0


class _Side(Protocol):
    """Tells log-probabilities of a model at the places that it was read at."""

    def logprobs(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Returns those of tokens (S,) in these rows (S,), without gradient."""

    def weighed(self, rows: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns their sum, 0-d and differentiable, with weights (S,)."""


@dataclass(frozen=True)
class _OfHead:
    """Tells them of hidden states (N, H) and a head. The gradient is taken at once, as that of the distance is."""

    hidden: torch.Tensor
    head: HeadParameters
    transform: LogitTransform
    options: HeadOptions

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        hidden: torch.Tensor,
        head: HeadParameters,
        temperature: float,
        options: HeadOptions,
    ) -> _OfHead:
        """Returns those of a model whose logits are divided by a temperature."""
        cap, scale = head_transform(model.config)
        transform = LogitTransform.of(temperature=temperature, softcap=cap, logit_scale=scale)
        return cls(hidden.to(head.weight.device), head, transform, options)

    def logprobs(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            given = (self.hidden[rows], self.head.weight, tokens, self.head.bias, self.transform)
            return required(token_logprobs(*given, ("logprobs",), self.options).logprobs)

    def weighed(self, rows: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        given = (self.hidden[rows], self.head.weight, tokens, self.head.bias, self.transform)
        summed = lambda scores, part: (scores.logprobs * weights[part]).sum()  # noqa: E731
        return token_loss_of_head(*given, ("logprobs",), self.options, summed).loss

    def bases(self, rows: torch.Tensor, factors: torch.Tensor) -> DistanceHead:
        """Returns the head at rows with factors, both (G,)."""
        return DistanceHead(self.hidden[rows], self.head.weight, self.head.bias, self.transform, factors)


@dataclass(frozen=True)
class _OfLogits:
    """Tells them of a model's own logits (N, V)."""

    logits: torch.Tensor
    temperature: float

    def logprobs(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return selective_log_softmax(self.logits[rows], tokens, self.temperature).float()

    def weighed(self, rows: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (selective_log_softmax(self.logits[rows], tokens, self.temperature) * weights).sum()


def _compared(
    given: SpanComparison,
    student: _Side,
    teacher: _Side,
    compare: Callable[[torch.Tensor, torch.Tensor], DistanceLoss],
    untempered: _Side,
) -> dict[str, torch.Tensor]:
    """Returns the loss and the parts, by name.

    compare: from the factors (G,) of both sides' rows to their distance. untempered: tells the student's
    log-probabilities at a temperature of 1.
    """
    logprobs = student.logprobs(given.student.others, given.student.tokens)
    factors = _factors(logprobs, given.student)
    others = _factors(teacher.logprobs(given.teacher.others, given.teacher.tokens), given.teacher)
    loss, parts, by_factor = compare(factors, others)
    if torch.is_grad_enabled() and len(logprobs):
        # What is left of the gradient: that of the factors, which are made of these log-probabilities.
        weights = (by_factor * factors)[given.student.spans].masked_fill(logprobs < _SMALLEST, 0.0)
        term = student.weighed(given.student.others, given.student.tokens, weights)
        loss = loss + (term - term.detach())
    if given.target_rows is not None and given.targets is not None:
        weights = torch.full_like(given.target_rows, given.target_weight, dtype=torch.float32)
        loss = loss - untempered.weighed(given.target_rows, given.targets, weights)
    return {"loss": loss, "parts": parts}


def _factors(logprobs: torch.Tensor, rows: SpanRows) -> torch.Tensor:
    """Returns of each of G spans the product of the probabilities (S,) that are multiplied in, (G,) float32."""
    summed = torch.zeros(len(rows.bases), device=logprobs.device)
    return summed.index_add_(0, rows.spans, logprobs.float().clamp_min(_SMALLEST)).exp_()


@dataclass(frozen=True)
class ReadSpanDistance(TwoHeads):
    """Computes the distance of a student from a teacher's states, span by span."""

    teacher: TeacherStates
    comparison: SpanComparison
    head: HeadOptions = DEFAULT_HEAD

    def of_states(self, model: PreTrainedModel, hidden: torch.Tensor, num_tokens: int) -> SpanLoss:
        """Returns the loss of a student's hidden states (N, H), with the parts of the spans' distances.

        Raises:
            ValueError: the teacher gave logits, or the heads are on different devices.
        """
        self.check_states()
        found = call_head(model, partial(self.of_head, model, num_tokens), hidden)
        return SpanLoss(**found)

    def compare_heads(
        self,
        model: PreTrainedModel,
        states: torch.Tensor,
        head: HeadParameters,
        teacher_states: torch.Tensor,
        teacher_head: HeadParameters,
        options: HeadOptions,
    ) -> dict[str, torch.Tensor]:
        """Returns the loss and the parts, by name, of states (N, H) and (N', H')."""
        given = self.comparison
        if self.head.workspace_bytes is None:
            # By itself it is one of a head's logits, and TRL keeps all rows.
            needed = row_bytes(len(head.weight), len(teacher_head.weight)) * min(len(given.weights), _LEAST_ROWS)
            options = replace(options, workspace_bytes=max(options.workspace_bytes or 0, needed))
        # A weight in parts takes its gradient in one way only, that of the distance.
        head, teacher_head = head._replace(source=None), teacher_head._replace(source=None)
        student = _OfHead.of(model, states, head, given.temperature, options)
        teacher = _OfHead.of(self.teacher.model, teacher_states, teacher_head, given.teacher_temperature, options)

        def compare(factors: torch.Tensor, others: torch.Tensor) -> DistanceLoss:
            sides = student.bases(given.student.bases, factors), teacher.bases(given.teacher.bases, others)
            return linear_distance(*sides, given.weights, given.distance, options)

        return _compared(given, student, teacher, compare, _OfHead.of(model, states, head, 1.0, options))

    def of_logits(self, model: PreTrainedModel, logits: torch.Tensor) -> SpanLoss:
        """Returns the same of a student's own logits (N, V); what its head does to them is in them.

        Raises:
            ValueError: the teacher gave hidden states.
        """
        if self.teacher.logits is None:
            raise ValueError("the student gives logits of its own, so the teacher has to do the same")
        given = self.comparison
        student = _OfLogits(logits, given.temperature)
        teacher = _OfLogits(self.teacher.logits.to(logits.device), given.teacher_temperature)

        def compare(factors: torch.Tensor, others: torch.Tensor) -> DistanceLoss:
            rows = (logits[given.student.bases], teacher.logits[given.teacher.bases])
            temperatures = (given.temperature, given.teacher_temperature)
            return logit_distance(*rows, (factors, others), temperatures, given.weights, given.distance)

        return SpanLoss(**_compared(given, student, teacher, compare, _OfLogits(logits, 1.0)))
