"""Scores tokens and reads their divergence from a teacher, both from the same hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from trl_fast.ops import DivergenceLoss, TokenScores
from trl_fast.ops.linear_divergence import DivergenceScores
from trl_fast.ops.token_scores import required

from .distillation import ReadDivergence
from .lm_head import HeadParameters
from .scoring import ScoringRequest, call_head, read_head, score_logits


class ScoredDivergence(NamedTuple):
    """Holds the scores of N tokens without gradient, the loss of them if one was asked for, and the divergence."""

    tokens: TokenScores
    token_loss: torch.Tensor | None
    divergence: DivergenceLoss


@dataclass(frozen=True)
class ReadScoredDivergence:
    """Scores a student's tokens, and computes its divergence with weights that follow from these scores.

    scoring: asks for log-probabilities, and maybe for a token loss; divergence: how the divergence is read; weights:
    from the log-probabilities (N,) to the rows' weights (N,) float32.
    """

    scoring: ScoringRequest
    divergence: ReadDivergence
    weights: Callable[[torch.Tensor], torch.Tensor]

    def of_states(self, model: PreTrainedModel, hidden: torch.Tensor, num_tokens: int) -> ScoredDivergence:
        """Returns both of hidden states (N, H); a head pass more than the divergence alone, three with a token loss.

        Raises:
            ValueError: as in `ReadDivergence`.
        """
        self.divergence.check_states()

        def read(states: torch.Tensor, head: HeadParameters) -> dict[str, torch.Tensor]:
            # A weight in parts takes its gradient in one way only, that of the divergence.
            head = head._replace(source=None)
            with self._gradients():
                scored = read_head(model, self.scoring, num_tokens, states, head)
            # While the head is whole: an engine that gathers it twice in a pass reads other weights in backward.
            found = self._weighed(scored["logprobs"]).of_head(model, num_tokens, states, head)
            return {**{f"token {name}": value for name, value in scored.items()}, **found}

        found = call_head(model, read, hidden)
        loss = found.pop("token loss", None)
        tokens = TokenScores(**{name: found.pop(f"token {name}") for name in self.scoring.outputs})
        return ScoredDivergence(tokens, loss, DivergenceLoss(found.pop("loss"), DivergenceScores(**found)))

    def of_logits(self, model: PreTrainedModel, logits: torch.Tensor) -> ScoredDivergence:
        """Returns the same of a student's own logits (N, V).

        Raises:
            ValueError: as in `ReadDivergence`.
        """
        with self._gradients():
            tokens, loss = score_logits(logits, self.scoring)
        return ScoredDivergence(tokens, loss, self._weighed(required(tokens.logprobs)).of_logits(model, logits))

    def _gradients(self) -> torch.set_grad_enabled:
        """Returns a context without gradients where there is no loss of the scores."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.scoring.token_loss is not None)

    def _weighed(self, logprobs: torch.Tensor) -> ReadDivergence:
        return replace(self.divergence, weights=self.weights(logprobs))
