"""Computes divergences over some tokens only, K a row: the likeliest ones of a head, or those that are given.

The two distributions are compared on K + 1 classes: each known token, and the tail, all other tokens together (as with
`loss_add_tail` of TRL's server distillation). By the logits of the tail's tokens the gradient is then s · c with one
number c a row, so that the head's own row kernels do the row work, on every backend: they sum up the tail's logits and
write s · c. What is left is arithmetic on (R, K) numbers, in float64.

The tail's probability is the sum of its tokens', and not what the others leave of 1: where the student is sure of a
known token, nothing would be left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..head.logit_transform import LogitTransform
from ..head.row_kernels import RowKernels
from ..head.row_statistics import ENTROPY, SUM, SUM_X, TOP
from ..head.sweep import new_state
from .formulas import DivergenceFormula, divergence_terms
from .row_kernels import DIVERGENCE_ROW, ENTROPY_ROW, IS_SAME_TOP1_ROW

_MINUS_INF = float("-inf")


class ChosenTokens(NamedTuple):
    """Holds the tokens of R rows that are compared: ids (R, K) int64, and which of them are padding, (R, K) bool.

    The others are distinct in a row, the first one is no padding, and padding has its id.
    """

    ids: torch.Tensor
    padding: torch.Tensor


def likeliest_tokens(
    logits: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform, top_k: int
) -> ChosenTokens:
    """Returns the `top_k` likeliest tokens of raw products (R, V), without those that are ruled out; bias: (V,)."""
    shown = logits if bias is None else logits + bias.to(logits.dtype)
    ids = shown.topk(top_k, dim=1, largest=transform.scale > 0).indices
    padding = _logits_at(logits, bias, transform, ids)[0] == _MINUS_INF
    return ChosenTokens(torch.where(padding, ids[:, :1], ids), padding)


class KnownTokens(NamedTuple):
    """Holds what is known of R rows of a teacher, log-probabilities in float64.

    ids: (R, K) int64, distinct but for padding, whose id is that of the likeliest of the K; logprobs: (R, K);
    padding: (R, K) bool; first: (R, 1) int64, the place of that likeliest one; is_likeliest: (R, 1) bool, whether no
    other token of the vocabulary is likelier; tail: (R, 1), of all others together.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    padding: torch.Tensor
    first: torch.Tensor
    is_likeliest: torch.Tensor
    tail: torch.Tensor

    @classmethod
    def given(cls, ids: torch.Tensor, logprobs: torch.Tensor) -> KnownTokens:
        """Returns given tokens ids (R, K) integer of logprobs (R, K), −inf being padding.

        What they leave of 1 is the probability of all others. They are taken for the likeliest ones.
        """
        logprobs = logprobs.double()
        tail = (-torch.expm1(logprobs.logsumexp(dim=1, keepdim=True))).clamp(min=0).log()
        return cls._of(ids.long(), logprobs, logprobs == _MINUS_INF, tail, torch.ones_like(tail, dtype=torch.bool))

    @classmethod
    def of_head(
        cls,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        chosen: ChosenTokens,
        kernels: RowKernels,
    ) -> KnownTokens:
        """Returns chosen tokens of a teacher's raw products (R, V), which are changed; bias: (V,) or None."""
        ids, padding = chosen
        u, _ = _logits_at(logits, bias, transform, ids)
        u = u.masked_fill(padding, _MINUS_INF)
        others = _Tail.of(kernels, logits, bias, transform, ids, (~padding).sum(dim=1))
        lse = torch.cat([u, others.lse], dim=1).logsumexp(dim=1, keepdim=True)
        return cls._of(ids, u - lse, padding, others.lse - lse, u.amax(dim=1, keepdim=True) >= others.top)

    @classmethod
    def _of(
        cls,
        ids: torch.Tensor,
        logprobs: torch.Tensor,
        padding: torch.Tensor,
        tail: torch.Tensor,
        is_likeliest: torch.Tensor,
    ) -> KnownTokens:
        first = logprobs.argmax(dim=1, keepdim=True)
        ids = torch.where(padding, ids.gather(1, first), ids)
        return cls(ids, logprobs, padding, first, is_likeliest, tail)

    def rows(self, index: slice) -> KnownTokens:
        """Returns the same of some rows."""
        return KnownTokens(*(one[index] for one in self))


def _logits_at(
    logits: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits of tokens ids (R, K), and their derivatives by the raw products (R, V), both in float64."""
    raw = logits.gather(1, ids).double()
    if bias is not None:
        raw = raw + bias.double()[ids]
    u, cap_derivative = transform.apply(raw, None)
    rise = torch.full_like(u, transform.scale * transform.inv_temperature)
    return u, rise if cap_derivative is None else rise * cap_derivative


class _Tail(NamedTuple):
    """Holds what the other tokens' logits have, (R, 1) float64 each: log-sum-exp, mean by probability, the largest."""

    lse: torch.Tensor
    mean: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(
        cls,
        kernels: RowKernels,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        ids: torch.Tensor,
        counts: torch.Tensor,
    ) -> _Tail:
        """Sums up the tokens that are not among ids (R, K), of which counts (R,) are distinct; these are ruled out.

        A cap leaves a token that is ruled out at the lowest logit that there is: what this adds is subtracted again.
        """
        logits.scatter_(1, ids, _MINUS_INF if transform.scale > 0 else -_MINUS_INF)
        state = new_state(len(logits), logits.device)
        kernels.scores(logits, ids[:, 0].contiguous(), bias, *transform, ENTROPY, 0, state)
        top, total, moment = state[TOP], state[SUM], state[SUM_X]
        if transform.softcap:
            # The kernels leave the target out, which is one of them.
            floor = -transform.softcap * transform.inv_temperature - torch.where(top == _MINUS_INF, 0.0, top)
            added = (counts - 1).clamp(min=0) * floor.exp()
            # Where there is no other token, the difference is rounding.
            total = (total - added).clamp(min=0).masked_fill(counts == logits.shape[1], 0)
            moment = moment - added * floor
        mean = torch.where(total == 0, 0.0, top + moment / total)
        lse = torch.where(total == 0, _MINUS_INF, top + total.log())
        return cls(lse[:, None], mean[:, None], top[:, None])


def row_divergence_to_known(
    kernels: RowKernels,
    student: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    known: KnownTokens,
    formula: DivergenceFormula,
    tail: bool,
    weights: torch.Tensor,
    results: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Computes the divergence of R rows to known tokens, and its gradient by the student's raw product.

    Args:
        kernels: the head's row kernels.
        student: (R, V) raw products, which are changed; bias: (V,) or None; transform: from both to the logits.
        tail: whether the tail is a class. If not, both distributions are those among the known tokens.
        weights, results, gradient: as in row_kernels.py; the gradient has the student's dtype or lies elsewhere.
    """
    padding = known.padding
    counts = (~padding).sum(dim=1)
    # Where there is no other token, what these leave of 1 is rounding.
    tail_t = known.tail.masked_fill((counts == student.shape[1])[:, None], _MINUS_INF)
    u, derivative = _logits_at(student, bias, transform, known.ids)
    others = _Tail.of(kernels, student, bias, transform, known.ids, counts)
    u = torch.cat([u.masked_fill(padding, _MINUS_INF), others.lse], dim=1)
    lse = u.logsumexp(dim=1, keepdim=True)
    p_of_all = (u - lse).exp()
    logp_s, logp_t = u - lse, torch.cat([known.logprobs, tail_t], dim=1)
    if not tail:
        logp_s[:, -1], logp_t[:, -1] = _MINUS_INF, _MINUS_INF
        logp_s, logp_t = (logp - logp.logsumexp(dim=1, keepdim=True) for logp in (logp_s, logp_t))
    value, rise = divergence_terms(logp_s, logp_t, formula)
    p = logp_s.exp()
    means = torch.cat([u[:, :-1], others.mean], dim=1)
    top = u[:, :-1].gather(1, known.first)
    is_top = known.is_likeliest & (top >= torch.maximum(u[:, :-1].amax(dim=1, keepdim=True), others.top))
    results[DIVERGENCE_ROW] = value.sum(dim=1).to(results.dtype)
    # Not the log-sum-exp less a sum: with a large common offset, these have lost digits.
    entropy = torch.where(p_of_all == 0, 0.0, p_of_all * (lse - means)).sum(dim=1)
    results[ENTROPY_ROW] = entropy.to(results.dtype)
    results[IS_SAME_TOP1_ROW] = is_top.squeeze(1).to(results.dtype)
    if gradient is None:
        return
    factor = weights.double()[:, None]
    mean = rise.sum(dim=1, keepdim=True)
    # By the tail's tokens s · share, of the whole tail's rise.
    share = torch.where(p[:, -1:] == 0, 0.0, rise[:, -1:] / p[:, -1:] - mean)
    rounded = lse.to(results.dtype)
    coefficients = torch.zeros(4, len(student), dtype=results.dtype, device=student.device)
    # The kernels take the rounded log-sum-exp.
    coefficients[0] = torch.where(factor == 0, 0.0, factor * share * torch.exp(rounded - lse)).squeeze(1)
    kernels.grad(
        student, known.ids[:, 0].contiguous(), bias, *transform, rounded.squeeze(1), coefficients, 0, gradient
    )
    at_known = torch.where(factor == 0, 0.0, factor * (rise[:, :-1] - p[:, :-1] * mean) * derivative)
    at_known = torch.where(padding, at_known.gather(1, known.first), at_known)
    gradient.scatter_(1, known.ids, at_known.to(gradient.dtype))
