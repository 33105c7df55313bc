"""Computes the step of self-distillation: how far a student lies from itself after a prompt that tells more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from trl_fast.data import TokenBatch
from trl_fast.losses.loss_inputs import ALL, Rows
from trl_fast.losses.mean_metric import Metric
from trl_fast.losses.self_distillation import clipped_ratios, sampled_token_terms
from trl_fast.modeling.distillation import DivergenceSettings, ReadDivergence, TeacherStates
from trl_fast.modeling.scored_divergence import ReadScoredDivergence
from trl_fast.modeling.scoring import ModelReading, ModelScores, ScoringRequest, read_model, score
from trl_fast.ops import HeadOptions, TokenScores
from trl_fast.ops.token_scores import required

from ..base.step import StepResult, router_keywords, with_router_loss
from .arguments import SAMPLED_TOKEN, TOPK_LOGITS

DISTILLATION_LOSS = "self_distillation/distillation_loss"


class Teacher(Protocol):
    """Names what the step asks of a teacher: about a batch of its own prompts, without gradient."""

    def states(self, batch: TokenBatch) -> TeacherStates:
        """Returns the teacher's states at the N scored positions."""

    def score(self, batch: TokenBatch, *, temperature: float) -> TokenScores:
        """Returns the scores of the N tokens, of which the log-probabilities are read."""


@dataclass(frozen=True)
class SelfDistillationUpdate:
    """Holds a micro-batch of N tokens: after the student's prompts, and M of them after the teacher's.

    counts, weights: (N,) float32, whether a token is learned from the teacher, 1 or 0, and its weight in the loss;
    old_logprobs: (N,) float32 of the student that sampled; None: it is the present one; taught: (M,) int64, the tokens
    that the teacher reads, in their order; None: it reads all.
    """

    batch: TokenBatch
    teacher_batch: TokenBatch
    counts: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    taught: torch.Tensor | None = None

    def of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the teacher's values (M, ...) as those of all tokens (N, ...): 0 where it has none."""
        if self.taught is None:
            return values
        return values.new_zeros(len(self.counts), *values.shape[1:]).index_copy_(0, self.taught, values)


@dataclass(frozen=True)
class SelfDistillationSettings:
    """Holds what is compared, under TRL's names without `distillation_`; mode: see arguments.py.

    alpha: beta of `ops.linear_divergence`; is_clip: upper bound of the ratio to the policy that sampled, None: no
    ratio; temperature: divides both sides' logits.
    """

    mode: str
    alpha: float
    topk: int | None = None
    add_tail: bool = False
    is_clip: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, args: Any) -> SelfDistillationSettings:
        """Returns those of a trainer's arguments."""
        names = ("mode", "alpha", "topk", "add_tail", "is_clip")
        return cls(**{name: getattr(args, f"distillation_{name}") for name in names}, temperature=args.temperature)

    @property
    def divergence(self) -> DivergenceSettings:
        """Returns the divergence between whole distributions, or on the student's likeliest tokens."""
        whole = DivergenceSettings(self.alpha, temperature=self.temperature, outputs=("divergence",))
        if self.mode != TOPK_LOGITS:
            return whole
        return replace(whole, top_k=self.topk, top_k_of="student", tail=self.add_tail)


@dataclass(frozen=True)
class TokenLossBeside:
    """Holds a further loss of the student's tokens: `loss` and `group_sizes` as in `ops.linear_token_loss`."""

    loss: Callable[[TokenScores, torch.Tensor], torch.Tensor]
    group_sizes: tuple[int, ...] | None = None


def self_distillation_step(
    model: Callable[..., Any],
    teacher: Teacher,
    update: SelfDistillationUpdate,
    settings: SelfDistillationSettings,
    *,
    head: HeadOptions,
    beside: TokenLossBeside | None = None,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
    **keywords: Any,
) -> StepResult:
    """Computes the loss of one micro-batch, Σ weight · ratio · term, and the mean of the terms with their ratios.

    A term is a token's divergence from the teacher, or what `sampled_token_terms` makes of its log-probability. The
    teacher's backbone runs first, on its own row, in which its prompts too are computed once.

    Args:
        model: the student, with `modeling.scoring.attach_scoring`, as it is called.
        teacher: the teacher.
        update: the micro-batch, on the model's device.
        settings: what is compared.
        head: the user's settings of the head.
        beside: a loss that is added, of the same tokens.
        router_coef: weight of a mixture of experts' load-balancing loss.
        loss_divisor: accumulation steps that the router's loss is divided by.
        keywords: go to the student's forward.

    Returns:
        The loss, its metrics, and the tokens' scores where the student's tokens were scored.
    """
    keywords |= router_keywords(router_coef)
    compare = _compare_tokens if settings.mode == SAMPLED_TOKEN else _compare_distributions
    found = compare(model, teacher, update, settings, head, beside, keywords)
    loss, metrics = with_router_loss(found.loss, found.read, router_coef, loss_divisor)
    distilled = Metric((found.terms * update.counts).sum(), update.counts.sum())
    return StepResult(loss, {DISTILLATION_LOSS: distilled, **metrics}, found.scores)


@dataclass(frozen=True)
class _Compared:
    """Holds the loss, 0-d; what the model gave; the terms (N,) without gradient; and the tokens' scores, if known."""

    loss: torch.Tensor
    read: ModelScores | ModelReading
    terms: torch.Tensor
    scores: TokenScores | None


def _corrected(
    values: torch.Tensor,
    update: SelfDistillationUpdate,
    settings: SelfDistillationSettings,
    logprobs: torch.Tensor,
    rows: Rows = ALL,
) -> torch.Tensor:
    """Returns values (R,) times the ratios of the tokens `rows`, if there are any; logprobs: (R,) of the student."""
    if settings.is_clip is None or update.old_logprobs is None:
        return values
    return values * clipped_ratios(logprobs, update.old_logprobs[rows], settings.is_clip)


def _compare_tokens(
    model: Callable[..., Any],
    teacher: Teacher,
    update: SelfDistillationUpdate,
    settings: SelfDistillationSettings,
    head: HeadOptions,
    beside: TokenLossBeside | None,
    keywords: dict[str, Any],
) -> _Compared:
    """Compares the log-probabilities of the completions' own tokens: one sweep of the head, for both losses."""
    known = required(teacher.score(update.teacher_batch, temperature=settings.temperature).logprobs)
    known = update.of_all(known)

    def terms(logprobs: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        return _corrected(sampled_token_terms(logprobs, known[rows]), update, settings, logprobs, rows)

    def loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        own = (update.weights[rows] * terms(required(scores.logprobs), rows)).sum()
        return own if beside is None else own + beside.loss(scores, rows)

    scored = score(
        *(model, update.batch),
        temperature=settings.temperature,
        head=head,
        token_loss=loss,
        group_sizes=None if beside is None else beside.group_sizes,
        **keywords,
    )
    assert scored.loss is not None, "a token loss was asked for"
    return _Compared(scored.loss, scored, terms(required(scored.tokens.logprobs)), scored.tokens)


def _compare_distributions(
    model: Callable[..., Any],
    teacher: Teacher,
    update: SelfDistillationUpdate,
    settings: SelfDistillationSettings,
    head: HeadOptions,
    beside: TokenLossBeside | None,
    keywords: dict[str, Any],
) -> _Compared:
    """Compares distributions; tokens are scored only for a ratio to the policy that sampled, or for a loss beside."""
    batch, states = update.batch, teacher.states(update.teacher_batch)
    hidden, logits = (one if one is None else update.of_all(one) for one in (states.hidden, states.logits))
    states = states._replace(hidden=hidden, logits=logits)
    reading = ReadDivergence(states, update.weights, settings.divergence, head)
    corrects = settings.is_clip is not None and update.old_logprobs is not None
    if beside is None and not corrects:
        read = read_model(model, batch, reading, **keywords)
        return _Compared(read.value.loss, read, read.value.scores.divergence, None)
    given = (beside.loss, beside.group_sizes) if beside is not None else (None, None)
    asked = (batch.score_positions, batch.targets, batch.input_ids.shape[1], ("logprobs",), settings.temperature, head)
    scoring = ScoringRequest(*asked, *given)
    weights = partial(_corrected, update.weights, update, settings)
    read = read_model(model, batch, ReadScoredDivergence(scoring, reading, weights), **keywords)
    tokens, token_loss, (loss, scores) = read.value
    terms = _corrected(scores.divergence, update, settings, tokens.logprobs)
    return _Compared(loss if token_loss is None else loss + token_loss, read, terms, tokens)
