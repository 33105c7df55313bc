"""Computes the divergence between a student's and a teacher's next-token distributions from their hidden states.

Neither head's logits ever exist whole. The loss is a weighted sum of rows, whose gradient is known as soon as a row's
logits of both heads are there: `trl_fast::linear_divergence` computes it in the forward pass. That is four passes over
N·V·H (both products, and the gradients of hidden states and weight), three where the student's head is frozen, and one
less with a teacher whose log-probabilities are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .backends import choose_backend
from .device import device_facts
from .divergence.checks import HeadArguments, check_given, check_heads, check_rows
from .divergence.formulas import DivergenceFormula
from .divergence.given import KnownTokens
from .divergence.heads import DivergenceHead
from .divergence.row_kernels import DIVERGENCE_ROW, ENTROPY_ROW, IS_SAME_TOP1_ROW, NUM_RESULTS
from .divergence.sweep import sweep_divergence
from .divergence.teachers import Teacher
from .head.gradients import Needs, waiting_dtype
from .head.logit_transform import LogitTransform
from .head.plan import HeadOptions
from .matmul import gemm_dtype
from .memory_pool import scaled
from .named_gradients import AutogradContext, first_derivative, gradients_of, needs_gradients
from .validation import check_choice, refuse_forward_mode

_OP = "trl_fast::linear_divergence"
# Whose likeliest tokens are compared.
_SIDES = ("teacher", "student")
_OUTPUT_ROWS = {"divergence": DIVERGENCE_ROW, "entropy": ENTROPY_ROW, "is_same_top1": IS_SAME_TOP1_ROW}


@dataclass
class DivergenceScores:
    """Holds what is known of N rows, (N,) float32 each, without gradient; None where it was not asked for.

    Attributes:
        divergence: of the student's distribution and the teacher's, in nats (total variation: in [0, 1]).
        entropy: of the student's distribution, in nats.
        is_same_top1: 1.0 where no token is more likely for the student than the teacher's likeliest, else 0.0.
    """

    divergence: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_same_top1: torch.Tensor | None = None


class DivergenceLoss(NamedTuple):
    """Holds the loss, 0-d float32 and differentiable, and the scores of its rows."""

    loss: torch.Tensor
    scores: DivergenceScores


@torch.library.custom_op(_OP, mutates_args=())
def _linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    teacher_logprobs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    transform: Sequence[float],
    teacher_transform: Sequence[float],
    formula: Sequence[float],
    top_k: int,
    of_student: bool,
    tail: bool,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the weighted sum of the rows' divergences, results (3, N), and the gradients that are needed.

    hidden: (N, H); weight: (at least V, H); bias: as many, or None; the teacher's alike, or logprobs and ids (N, K);
    weights: (N,) or None; transform, formula: the numbers of LogitTransform and DivergenceFormula.
    Gradients have the dtypes of their tensors; those of float16 tensors wait in float32 for the factor of the loss.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        numbers = DivergenceFormula(formula[0], formula[1], formula[2], is_tvd=formula[3] != 0)
        student = DivergenceHead.of(hidden, weight, bias, LogitTransform(*transform), vocab_size)
        teacher = Teacher(numbers, backend, top_k=top_k, of_student=of_student, tail=tail)
        if teacher_hidden is not None and teacher_weight is not None:
            given = (teacher_hidden, teacher_weight, teacher_bias, LogitTransform(*teacher_transform), vocab_size)
            teacher.head, teacher.hidden = DivergenceHead.of(*given), teacher_hidden
        elif teacher_logprobs is not None and teacher_ids is not None:
            teacher.known = KnownTokens.given(teacher_ids, teacher_logprobs)
        needs = Needs(need_hidden, need_weight, need_bias)
        dtypes = [waiting_dtype(one.dtype) for one in (hidden, weight, weight if bias is None else bias)]
        results, gradients = sweep_divergence(
            student,
            hidden,
            teacher,
            weights,
            needs,
            weight.shape[0],
            (dtypes[0], dtypes[1], dtypes[2]),
            workspace_bytes,
        )
        divergence = results[DIVERGENCE_ROW]
        if weights is not None:
            divergence = torch.where(weights == 0, 0.0, divergence * weights)
        return divergence.sum(), results, *gradients


@_linear_divergence.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *others: Any) -> tuple[torch.Tensor, ...]:
    need_hidden, need_weight, need_bias = others[-5:-2]
    bias_dtype = weight.dtype if bias is None else bias.dtype
    sums = torch.promote_types(gemm_dtype(hidden), torch.float32)
    return (
        hidden.new_empty((), dtype=sums),
        hidden.new_empty((NUM_RESULTS, hidden.shape[0]), dtype=sums),
        hidden.new_empty(hidden.shape if need_hidden else 0, dtype=waiting_dtype(hidden.dtype)),
        weight.new_empty(weight.shape if need_weight else 0, dtype=waiting_dtype(weight.dtype)),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=waiting_dtype(bias_dtype)),
    )


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside the gradients of hidden, weight and bias."""

    dtypes: list[torch.dtype]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    hidden, weight, bias, *_ = inputs
    # Without a bias it is not looked at.
    ctx.dtypes = [hidden.dtype, weight.dtype, (weight if bias is None else bias).dtype]


@first_derivative("linear_divergence")
def _backward(
    ctx: _Context, grad_loss: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return gradients_of(_OP)
    names = ("hidden", "weight", "bias")
    saved = zip(names, ctx.saved_tensors, ctx.dtypes, needs_gradients(ctx, _OP, *names), strict=True)
    return gradients_of(_OP, **{name: scaled(one, grad_loss, dtype) for name, one, dtype, needed in saved if needed})


_linear_divergence.register_autograd(_backward, setup_context=_setup_context)


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    beta: float = 1.0,
    kind: str = "jsd",
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: torch.Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    top_k: int | None = None,
    top_k_of: str = "teacher",
    tail: bool = True,
    outputs: tuple[str, ...] = ("divergence",),
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> DivergenceLoss:
    """Computes the weighted sum of divergences between a student's and a teacher's heads; gradient to the student.

    The heads, their transforms, workspace_bytes and backend are as in linear_logprob, each side with its own width
    and dtype. docs/ops.md has the divergences, by kind and beta.

    Args:
        hidden, teacher_hidden: (N, H) and (N, H'); weight, teacher_weight: (V, H) and (V', H').
        weights: (N,) floating point without gradient, factors of the rows in the loss; None: all 1. A row of weight 0
            is left out of the products, and its scores are 0.
        beta: in [0, 1]; of jsd 0 is the forward KL(teacher‖student), 1 the reverse KL.
        kind: "jsd", "skewed_forward_kl", "skewed_reverse_kl" or "tvd".
        vocab_size: columns from there on count in neither head, as where they are padded; None: all count.
        top_k: compares so many tokens; None: every token.
        top_k_of: whose likeliest tokens these are, "teacher" or "student".
        tail: whether with top_k all others are one more class; if not, the distributions among the top_k are compared.
        outputs: scores to return, among divergence, entropy, is_same_top1.

    Raises:
        ValueError: what is given is not as above, or workspace_bytes holds no row of both heads' logits.
        RuntimeError: the forced backend cannot serve.
    """
    transforms = [
        LogitTransform.of(temperature=temperature, softcap=cap, logit_scale=scale)
        for cap, scale in ((softcap, logit_scale), (teacher_softcap, teacher_logit_scale))
    ]
    student = HeadArguments(hidden, weight, bias, transforms[0])
    teacher = HeadArguments(teacher_hidden, teacher_weight, teacher_bias, transforms[1])
    check_choice("top_k_of", top_k_of, _SIDES)
    how = _Comparison(DivergenceFormula.of(kind, beta), top_k, tail, vocab_size, of_student=top_k_of == "student")
    return _loss(student, teacher, None, weights, how, outputs, HeadOptions(backend, workspace_bytes))


def linear_divergence_to_given(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    teacher_ids: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    beta: float = 1.0,
    kind: str = "jsd",
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    tail: bool = True,
    outputs: tuple[str, ...] = ("divergence",),
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> DivergenceLoss:
    """Computes the weighted sum of divergences to a teacher of whom some tokens' log-probabilities are given.

    They may come from a file or a server. That takes a pass less than `linear_divergence` does, whose arguments the
    others are. The temperature is the student's: the teacher's log-probabilities are taken as they are.

    Args:
        hidden: (N, H); weight: (V, H).
        teacher_logprobs: (N, K) floating point, of a distribution over the whole vocabulary; −inf is padding, whose id
            is not looked at.
        teacher_ids: (N, K) integer in [0, V), distinct in a row; usually the teacher's likeliest tokens.
        tail: whether all other tokens are one more class, whose probability is what is left of 1. If not, the
            distributions among the given tokens are compared.

    Raises:
        ValueError, RuntimeError: as in linear_divergence; and if a row that counts names a token twice or outside the
            vocabulary, none, or has probabilities of more than 1 in all. A GPU looks at these values only with
            TRL_FAST_CHECK=1.
    """
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    student = HeadArguments(hidden, weight, bias, transform)
    how = _Comparison(DivergenceFormula.of(kind, beta), None, tail, vocab_size)
    given = (teacher_logprobs, teacher_ids)
    return _loss(student, None, given, weights, how, outputs, HeadOptions(backend, workspace_bytes))


class _Comparison(NamedTuple):
    """Holds how two distributions are compared; the numbers are those of linear_divergence."""

    formula: DivergenceFormula
    top_k: int | None
    tail: bool
    vocab_size: int | None
    of_student: bool = False


def _loss(
    student: HeadArguments,
    teacher: HeadArguments | None,
    given: tuple[torch.Tensor, torch.Tensor] | None,
    weights: torch.Tensor | None,
    how: _Comparison,
    outputs: tuple[str, ...],
    options: HeadOptions,
) -> DivergenceLoss:
    """Checks what is given, calls the op, and names its results.

    teacher: a head; or given: log-probabilities and ids (N, K); weights: (N,) or None.
    """
    refuse_forward_mode("linear_divergence", *student[:3], *(teacher or ())[:3], *(given or ()))
    found, vocab_size = check_heads([student] if teacher is None else [student, teacher], how.vocab_size)
    for name in outputs:
        check_choice("outputs", name, _OUTPUT_ROWS)
    hidden, (_, weight, bias, transform) = found[0], student
    if how.top_k is not None and (type(how.top_k) is not int or not 1 <= how.top_k <= vocab_size):
        raise ValueError(f"top_k: expected 1 to the {vocab_size} tokens that count, got {how.top_k!r}")
    if how.of_student and how.top_k is None:
        raise ValueError("top_k_of='student' needs top_k, the number of its likeliest tokens; leave it out for all")
    if weights is not None:
        check_rows(weights, hidden)
    if given is not None:
        check_given(*given, weights, hidden, vocab_size)
    tensors = (found[-1], *teacher[1:3], None, None) if teacher else (None, None, None, *(given or ()))
    facts, trains = device_facts(hidden.device), torch.is_grad_enabled()
    loss, results, *_ = _linear_divergence(
        *(hidden, weight, bias, *(None if one is None else one.detach() for one in (*tensors, weights))),
        list(transform),
        list(LogitTransform() if teacher is None else teacher.transform),
        [float(number) for number in how.formula],
        *(how.top_k or 0, how.of_student, how.tail, vocab_size),
        *(trains and one is not None and one.requires_grad for one in (hidden, weight, bias)),
        options.workspace_on(hidden.device, facts),
        choose_backend(
            "linear_divergence" if given is None and how.top_k is None else "linear_divergence_to_given",
            *(options.backend, facts, hidden.dtype),
        ),
    )
    results = results.detach()
    return DivergenceLoss(loss, DivergenceScores(**{name: results[_OUTPUT_ROWS[name]] for name in outputs}))
