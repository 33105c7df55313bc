"""Compares a student's and a teacher's next-token probabilities by any function of both rows, from hidden states.

Neither head's logits ever exist whole. A distance says of some rows how far they are apart, and its gradient by the
student's probabilities; the gradient of the head follows while the rows are there, in the forward pass. That is four
passes over N·V·H as in `linear_divergence`, three where the student's head is frozen.

Each row of probabilities has a factor, such as the probability of the rest of a word that several tokens make.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from .device import device_facts
from .divergence.heads import DivergenceHead
from .divergence.sweep import StudentGradients, block_rows, loss_scale
from .head.gradients import Needs, waiting_dtype
from .head.logit_transform import LogitTransform
from .head.plan import HeadOptions, slices
from .memory_pool import pooled_empty, scaled

# Bytes that a column of a row takes beside its logit: probabilities, and what sorting them takes (values, places of 8
# bytes, and as much again while it sorts), of the student also the gradient.
_STUDENT_BYTES, _TEACHER_BYTES = 40, 32
# Rows of logits that are there already, whose temporaries are there at once.
_ROWS_OF_LOGITS = 64


class Distances(Protocol):
    """Names the results of a distance: parts (K, R), of which the first is the distance, and its gradient (R, V)."""

    @property
    def parts(self) -> torch.Tensor:
        """Returns the parts."""

    @property
    def gradient(self) -> torch.Tensor:
        """Returns the gradient by the student's probabilities."""


class Distance(Protocol):
    """Compares rows; `names` are those of the parts of its results, the first of which is the distance."""

    names: ClassVar[tuple[str, ...]]

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> Distances:
        """Returns the distances of probabilities (R, V) of the student and (R, V') of the teacher."""


class DistanceHead(NamedTuple):
    """Holds one side: hidden (N, H), weight (V, H), bias (V,) or None, transform, and the rows' factors (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform
    factors: torch.Tensor


class DistanceLoss(NamedTuple):
    """Holds Σ weight · distance, 0-d and differentiable, and of N rows without gradient the distance's parts (K, N).

    factor_gradients: (N,), the derivative of each row's weighted distance by its factor of the student.
    """

    loss: torch.Tensor
    parts: torch.Tensor
    factor_gradients: torch.Tensor


def linear_distance(
    student: DistanceHead,
    teacher: DistanceHead,
    weights: torch.Tensor,
    distance: Distance,
    options: HeadOptions,
) -> DistanceLoss:
    """Computes the weighted sum of distances between two heads' probabilities; gradient to the student's head.

    Args:
        student, teacher: both with the same rows N; vocabularies may differ. Only the student's head has gradients.
        weights: (N,) float32, without gradient.
        distance: compares some rows of probabilities, in float32.
        options: of which the workspace limits the memory that grows with rows times vocabulary.

    Raises:
        ValueError: the workspace holds no row of both heads' logits.
    """
    workspace = options.workspace_on(student.hidden.device, device_facts(student.hidden.device))
    needs = Needs(*(torch.is_grad_enabled() and one is not None and one.requires_grad for one in student[:3]))
    given = (*student[:3], student, teacher, weights, distance, needs, workspace)
    return DistanceLoss(*_LinearDistance.apply(*given))


def row_bytes(columns: int, teacher_columns: int, itemsize: int = 4) -> int:
    """Returns the bytes of the workspace that a row of two heads takes; itemsize: bytes of a logit."""
    return columns * (itemsize + _STUDENT_BYTES) + teacher_columns * (itemsize + _TEACHER_BYTES)


class _LinearDistance(torch.autograd.Function):
    """Computes the loss and, in the same pass, its gradients by the student's hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        student: DistanceHead,
        teacher: DistanceHead,
        weights: torch.Tensor,
        distance: Distance,
        needs: Needs,
        workspace_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [hidden.dtype, weight.dtype, (weight if bias is None else bias).dtype]
        student = student._replace(hidden=hidden, weight=weight, bias=bias)
        with torch.autocast(hidden.device.type, enabled=False):
            parts, factor_gradients, gradients = _swept(student, teacher, weights, distance, needs, workspace_bytes)
        ctx.needs = needs
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts, factor_gradients)
        return (parts[0] * weights).sum(), parts, factor_gradients

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: object) -> tuple[torch.Tensor | None, ...]:
        others = (None,) * 6
        if grad_loss is None:
            return (None, None, None, *others)
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
        return (*(scaled(one, grad_loss, dtype) if needed else None for one, dtype, needed in saved), *others)


def _swept(
    student: DistanceHead,
    teacher: DistanceHead,
    weights: torch.Tensor,
    distance: Distance,
    needs: Needs,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns parts (K, N), the gradients (N,) of the factors, and those of hidden states, weight and bias."""
    own, given = (DivergenceHead.of(*side[:4], len(side.weight)) for side in (student, teacher))
    num_rows = len(student.hidden)
    row = row_bytes(own.vocab_size, given.vocab_size, max(own.logits.itemsize, given.logits.itemsize))
    height = block_rows(num_rows, row, workspace_bytes, student.hidden.device)
    blocks = slices(0, num_rows, height)
    scale = loss_scale(own, weights * student.factors) if any(needs) else None
    bias = student.weight if student.bias is None else student.bias
    sums = (waiting_dtype(student.hidden.dtype), waiting_dtype(student.weight.dtype), waiting_dtype(bias.dtype))
    gradients = StudentGradients(own, needs, num_rows, own.vocab_size, sums, one_block=len(blocks) == 1)
    buffers = [
        pooled_empty((min(height, num_rows), side.vocab_size), side.logits, student.hidden.device)
        for side in (own, given)
    ]
    parts, factor_gradients = [], [weights.new_zeros(0)]
    # A call without rows tells how many parts there are.
    for rows in blocks or [slice(0, 0)]:
        count = rows.stop - rows.start
        logits = own.multiply(student.hidden[rows], buffers[0][:count])
        others = given.multiply(teacher.hidden[rows], buffers[1][:count])
        sides = student._replace(factors=student.factors[rows]), teacher._replace(factors=teacher.factors[rows])
        scaled_weights = weights[rows] if scale is None else weights[rows] * scale
        found, by_factor = _compare_rows(logits, others, sides, scaled_weights, distance, changes=any(needs))
        parts.append(found)
        factor_gradients.append(by_factor * weights[rows])
        if any(needs) and count:
            gradients.add(rows, logits.to(own.product), student.hidden[rows])
    return torch.cat(parts, dim=1), torch.cat(factor_gradients), gradients.results(scale)


def _compare_rows(
    logits: torch.Tensor,
    others: torch.Tensor,
    sides: tuple[DistanceHead, DistanceHead],
    weights: torch.Tensor,
    distance: Distance,
    *,
    changes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the parts (K, R) of raw logits (R, V) and (R, V'), and the gradient (R,) of each distance by its factor.

    sides: the heads, with the factors of these rows. changes: whether the student's logits become the gradient of
    Σ weight · distance by themselves; weights: (R,).
    """
    student, teacher = sides
    own, cap = student.transform.apply(logits, student.bias)
    given, _ = teacher.transform.apply(others, teacher.bias)
    own, given = own.softmax(-1), given.softmax(-1)
    given *= teacher.factors[:, None]
    found = distance(own * student.factors[:, None], given)
    gradient = found.gradient
    by_factor = (gradient * own).sum(-1)
    if changes:
        # Of the softmax, and of what the head does to its product.
        gradient -= by_factor[:, None]
        gradient *= own
        if cap is not None:
            gradient *= cap
        steepness = student.transform.scale * student.transform.inv_temperature
        gradient *= (weights * student.factors * steepness)[:, None]
        logits.copy_(gradient)
    return found.parts, by_factor


def logit_distance(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    temperatures: tuple[float, float],
    weights: torch.Tensor,
    distance: Distance,
) -> DistanceLoss:
    """Computes what `linear_distance` does of logits (N, V) and (N, V') that are there already.

    factors, temperatures: of the student and of the teacher.
    """
    sides = tuple(
        DistanceHead(given, given, None, LogitTransform.of(temperature=temperature), its)
        for given, temperature, its in zip((logits, teacher_logits), temperatures, factors, strict=True)
    )
    return DistanceLoss(*_LogitDistance.apply(logits, sides[0], sides[1], weights, distance))


class _LogitDistance(torch.autograd.Function):
    """Computes the loss of logits and its gradient by the student's, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        student: DistanceHead,
        teacher: DistanceHead,
        weights: torch.Tensor,
        distance: Distance,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(logits)
        parts, by_factors = [], []
        for rows in slices(0, len(logits), _ROWS_OF_LOGITS) or [slice(0, 0)]:
            sides = student._replace(factors=student.factors[rows]), teacher._replace(factors=teacher.factors[rows])
            changed = logits[rows].detach().clone()
            given = (changed, teacher.hidden[rows], sides, weights[rows], distance)
            found, by_factor = _compare_rows(*given, changes=True)
            gradient[rows] = changed
            parts.append(found)
            by_factors.append(by_factor * weights[rows])
        ctx.save_for_backward(gradient)
        results = torch.cat(parts, dim=1), torch.cat(by_factors)
        ctx.mark_non_differentiable(*results)
        return (results[0][0] * weights).sum(), *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None
