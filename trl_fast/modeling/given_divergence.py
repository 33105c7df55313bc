"""Reads how far a student's next-token distributions lie from a teacher of whom some log-probabilities are given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from trl_fast.ops import HeadOptions
from trl_fast.ops.divergence.formulas import DivergenceFormula
from trl_fast.ops.divergence.given import KnownTokens, row_divergence_to_known
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.row_kernels import ROW_KERNELS
from trl_fast.ops.linear_divergence import DivergenceLoss, DivergenceScores, linear_divergence_to_given

from .distillation import DivergenceSettings
from .lm_head import HeadParameters, head_transform
from .logit_divergence import logit_divergence
from .scoring import DEFAULT_HEAD, call_head, with_workspace


@dataclass(frozen=True)
class ReadGivenDivergence:
    """Computes the divergence of a student from a teacher's log-probabilities at the same positions.

    ids: (N, K) int64, tokens of each position; logprobs: (N, K) float32, the teacher's, −inf being padding; weights:
    (N,) float32, the weight of each row in the loss, rows of weight 0 are left out.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    weights: torch.Tensor
    settings: DivergenceSettings
    head: HeadOptions = DEFAULT_HEAD

    def of_states(self, model: PreTrainedModel, hidden: torch.Tensor, num_tokens: int) -> DivergenceLoss:
        """Returns the loss, 0-d and differentiable, of hidden states (N, H), with the scores of the rows."""
        found = call_head(model, partial(self._of_head, model, num_tokens), hidden)
        return DivergenceLoss(found.pop("loss"), DivergenceScores(**found))

    def _of_head(
        self, model: PreTrainedModel, num_tokens: int, states: torch.Tensor, head: HeadParameters
    ) -> dict[str, torch.Tensor]:
        options = with_workspace(self.head, model, head, states, num_tokens)
        device, transform, settings = head.weight.device, head_transform(model.config), self.settings
        loss, scores = linear_divergence_to_given(
            *(states.to(device), head.weight, self.logprobs.to(device), self.ids.to(device)),
            weights=self.weights.to(device),
            beta=settings.beta,
            kind=settings.kind,
            temperature=settings.temperature,
            bias=head.bias,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
            vocab_size=settings.vocab_size,
            tail=settings.tail,
            outputs=settings.outputs,
            workspace_bytes=options.workspace_bytes,
            backend=options.backend,
        )
        return {"loss": loss, **{name: getattr(scores, name) for name in settings.outputs}}

    def of_logits(self, model: PreTrainedModel, logits: torch.Tensor) -> DivergenceLoss:
        """Returns the same of a student's own logits (N, V); what its head does to them is in them."""
        settings, device = self.settings, logits.device
        formula = DivergenceFormula.of(settings.kind, settings.beta)
        transform = LogitTransform.of(temperature=settings.temperature)
        known = KnownTokens.given(self.ids.to(device), self.logprobs.to(device))

        def compare(rows: torch.Tensor, student: torch.Tensor, *given: Any) -> None:
            chosen = KnownTokens(*(each[rows] for each in known))
            row_divergence_to_known(
                *(ROW_KERNELS["torch"], student, None, transform, chosen, formula, settings.tail), *given
            )

        return logit_divergence(logits, self.weights.to(device), settings.vocab_size, compare)
