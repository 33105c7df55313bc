"""Reads how far a student's next-token distributions lie from a teacher's, while both heads are whole.

The teacher runs first, without gradient, and leaves its hidden states at the scored positions (`TeacherStates`). Its
head is read when the student's is: `linear_divergence` then has both, and no logit of either model is kept. An engine
that holds the heads in parts gathers both for that time, one inside the other. A student that is its own teacher has
one head.

Where a head is not understood, both models give logits of their own: slower, and with memory for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from trl_fast.data.packing import TokenBatch
from trl_fast.ops import HeadOptions
from trl_fast.ops.divergence.formulas import DivergenceFormula
from trl_fast.ops.divergence.given import KnownTokens, likeliest_tokens, row_divergence_to_known
from trl_fast.ops.divergence.row_kernels import row_divergence_reference
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.row_kernels import ROW_KERNELS
from trl_fast.ops.linear_divergence import DivergenceLoss, DivergenceScores, linear_divergence

from .lm_head import HeadParameters, head_transform
from .logit_divergence import logit_divergence
from .scoring import DEFAULT_HEAD, ModelReading, call_head, read_model, with_workspace
from .sharded_head import is_whole_in_forward_only


class TeacherStates(NamedTuple):
    """Holds what a teacher, `model`, gave at N positions: hidden states (N, H), or logits (N, V) of its own.

    head: a copy of its head, where that is not whole later. scope: returns the context in which the student's model is
    its teacher, with another adapter or none; None: the model is as it was.
    """

    model: PreTrainedModel
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    head: HeadParameters | None = None
    scope: Callable[[], AbstractContextManager[None]] | None = None

    def has_head_of(self, student: PreTrainedModel) -> bool:
        """Tells whether the teacher's head is the very one that a student has now."""
        head = student.get_output_embeddings()
        is_adapted = isinstance(head, BaseTunerLayer | ModulesToSaveWrapper)
        return self.model is student and (self.scope is None or not is_adapted)


class _ReadStates:
    """Takes a teacher's hidden states, or its logits, as they are."""

    def of_states(self, model: PreTrainedModel, hidden: torch.Tensor, num_tokens: int) -> TeacherStates:
        """Returns hidden states (N, H) with their model."""
        if not is_whole_in_forward_only(model):
            return TeacherStates(model, hidden=hidden)
        copies = call_head(model, _copied, hidden)
        return TeacherStates(model, hidden=hidden, head=HeadParameters(copies["weight"], copies.get("bias")))

    def of_logits(self, model: PreTrainedModel, logits: torch.Tensor) -> TeacherStates:
        """Returns logits (N, V) with their model."""
        return TeacherStates(model, logits=logits)


def _copied(hidden: torch.Tensor, head: HeadParameters) -> dict[str, torch.Tensor]:
    """Returns copies of a head's weight (V, H) and bias (V,), if it has one."""
    return {name: tensor.clone() for name in ("weight", "bias") if (tensor := getattr(head, name)) is not None}


@torch.no_grad()
def teacher_states(teacher: Callable[..., ModelReading], batch: TokenBatch) -> TeacherStates:
    """Returns a teacher's states at a batch's N scored positions. teacher: as it is called, wrapped or not."""
    return read_model(teacher, batch, _ReadStates()).value


@dataclass(frozen=True)
class DivergenceSettings:
    """Holds what is compared: the arguments of `ops.linear_divergence` under their names.

    vocab_size: tokens that both models know; columns of a head behind them are padding. None: all are known.
    """

    beta: float = 1.0
    kind: str = "jsd"
    temperature: float = 1.0
    top_k: int | None = None
    top_k_of: str = "teacher"
    tail: bool = True
    vocab_size: int | None = None
    outputs: tuple[str, ...] = ("divergence", "entropy")


class TwoHeads(ABC):
    """Compares a student's head with its teacher's, both of them whole.

    teacher: its states; head: the user's settings of the head.
    """

    teacher: TeacherStates
    head: HeadOptions

    @abstractmethod
    def compare_heads(
        self,
        model: PreTrainedModel,
        states: torch.Tensor,
        head: HeadParameters,
        teacher_states: torch.Tensor,
        teacher_head: HeadParameters,
        options: HeadOptions,
    ) -> dict[str, torch.Tensor]:
        """Returns what is found, by name, of states (N, H) of the student, `model`, and (N', H') of its teacher."""

    def check_states(self) -> None:
        """Checks that there are hidden states of the teacher.

        Raises:
            ValueError: it gave logits.
        """
        if self.teacher.hidden is None:
            raise ValueError("the teacher gave logits of its own, so the student has to do the same")

    def of_head(
        self, model: PreTrainedModel, num_tokens: int, states: torch.Tensor, head: HeadParameters
    ) -> dict[str, torch.Tensor]:
        """Returns the loss and the scores, by name, of hidden states (N, H) and the student's head, which is whole."""
        options = with_workspace(self.head, model, head, states, num_tokens)
        assert self.teacher.hidden is not None, "it is looked at before"
        known = head if self.teacher.has_head_of(model) else self.teacher.head
        if known is not None:
            return self._compared(model, states, head, self.teacher.hidden, known, options)
        found: dict[str, torch.Tensor] = {}
        has_gradient = torch.is_grad_enabled()

        def read(teacher_states: torch.Tensor, teacher_head: HeadParameters) -> dict[str, torch.Tensor]:
            with torch.set_grad_enabled(has_gradient):
                found.update(self._compared(model, states, head, teacher_states, teacher_head, options))
            return {}

        with torch.no_grad(), (self.teacher.scope or nullcontext)():
            call_head(self.teacher.model, read, self.teacher.hidden)
        return found

    def _compared(
        self,
        model: PreTrainedModel,
        states: torch.Tensor,
        head: HeadParameters,
        teacher_states: torch.Tensor,
        teacher_head: HeadParameters,
        options: HeadOptions,
    ) -> dict[str, torch.Tensor]:
        """Compares both where they are on one device."""
        own, other = head.weight.device, teacher_head.weight.device
        if own != other:
            raise ValueError(
                f"teacher_model: its head is on {other}, the student's on {own}; place both on one device by "
                "device_map"
            )
        return self.compare_heads(model, states, head, teacher_states, teacher_head, options)


@dataclass(frozen=True)
class ReadDivergence(TwoHeads):
    """Computes the divergence of a student from a teacher's states of the same positions.

    weights: (N,) float32, the weight of each row in the loss; rows of weight 0 are left out.
    """

    teacher: TeacherStates
    weights: torch.Tensor
    settings: DivergenceSettings
    head: HeadOptions = DEFAULT_HEAD

    def of_states(self, model: PreTrainedModel, hidden: torch.Tensor, num_tokens: int) -> DivergenceLoss:
        """Returns the loss, 0-d and differentiable, of a student's hidden states (N, H), with the scores of the rows.

        Raises:
            ValueError: the teacher gave logits, or the heads are on different devices.
        """
        self.check_states()
        found = call_head(model, partial(self.of_head, model, num_tokens), hidden)
        return DivergenceLoss(found.pop("loss"), DivergenceScores(**found))

    def compare_heads(
        self,
        model: PreTrainedModel,
        states: torch.Tensor,
        head: HeadParameters,
        teacher_states: torch.Tensor,
        teacher_head: HeadParameters,
        options: HeadOptions,
    ) -> dict[str, torch.Tensor]:
        """Returns the loss and the scores, by name, of states (N, H) and (N, H')."""
        device = head.weight.device
        own, given = head_transform(model.config), head_transform(self.teacher.model.config)
        settings = self.settings
        loss, scores = linear_divergence(
            *(states.to(device), head.weight, teacher_states.to(device), teacher_head.weight),
            weights=self.weights.to(device),
            beta=settings.beta,
            kind=settings.kind,
            temperature=settings.temperature,
            bias=head.bias,
            softcap=own.softcap,
            logit_scale=own.logit_scale,
            teacher_bias=teacher_head.bias,
            teacher_softcap=given.softcap,
            teacher_logit_scale=given.logit_scale,
            vocab_size=settings.vocab_size,
            top_k=settings.top_k,
            top_k_of=settings.top_k_of,
            tail=settings.tail,
            outputs=settings.outputs,
            workspace_bytes=options.workspace_bytes,
            backend=options.backend,
        )
        named = {name: getattr(scores, name) for name in settings.outputs}
        return {"loss": loss, **named}

    def of_logits(self, model: PreTrainedModel, logits: torch.Tensor) -> DivergenceLoss:
        """Returns the same of a student's own logits (N, V); what its head does to them is in them.

        Raises:
            ValueError: the teacher gave hidden states.
        """
        if self.teacher.logits is None:
            raise ValueError("the student gives logits of its own, so the teacher has to do the same")
        teacher, known = self.teacher.logits.to(logits.device), slice(self.settings.vocab_size)

        def compare(rows: torch.Tensor, student: torch.Tensor, *given: Any) -> None:
            _compare_logits(student, teacher[rows, known], self.settings, *given)

        return logit_divergence(logits, self.weights.to(logits.device), self.settings.vocab_size, compare)


def _compare_logits(
    student: torch.Tensor,
    teacher: torch.Tensor,
    settings: DivergenceSettings,
    weights: torch.Tensor,
    results: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Computes the divergence of R rows of logits (R, V), which are changed; the others are as in row_kernels.py."""
    formula = DivergenceFormula.of(settings.kind, settings.beta)
    transform = LogitTransform.of(temperature=settings.temperature)
    if settings.top_k is None:
        head = (None, transform.scale, transform.softcap)
        heads = (student, *head, teacher, *head)
        row_divergence_reference(*heads, transform.inv_temperature, *formula, weights, results, gradient)
        return
    shown = student if settings.top_k_of == "student" else teacher
    chosen = likeliest_tokens(shown, None, transform, settings.top_k)
    known = KnownTokens.of_head(teacher, None, transform, chosen, ROW_KERNELS["torch"])
    given = (known, formula, settings.tail, weights, results, gradient)
    row_divergence_to_known(ROW_KERNELS["torch"], student, None, transform, *given)
