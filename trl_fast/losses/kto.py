"""Kahneman-Tversky optimisation: from per-token log-probabilities to a loss and its metrics.

Notation of the docstrings: S sequences, each a prompt and one completion y that is labelled good or bad, with N scored
tokens; log π(y) is the sum of a completion's token log-probabilities under the policy, log π_ref(y) under the
reference; r = log π(y) − log π_ref(y); z is the reference point, an estimate of the policy's KL divergence from the
reference; σ is the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from trl_fast.ops.token_scores import required
from trl_fast.settings.ranges import check_ranges

from .mean_metric import Metric

LOSSES = ("kto", "apo_zero_unpaired")
# All tokens of a batch.
ALL = slice(None)


@dataclass(frozen=True)
class KTOLossConfig:
    """What to minimise. The fields have the names, meanings and defaults of `KTOConfig`.

    Raises:
        ValueError: loss_type is unknown, or a number out of range.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; expected one of {', '.join(LOSSES)}.")
        check_ranges(self)

    @property
    def needs_kl(self) -> bool:
        """Whether the loss has a reference point other than 0, for which mismatched completions are scored."""
        return self.loss_type == "kto"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The per-token values that the metrics read, by the names that `linear_logprob` knows them under."""
        return "logprobs", "entropy", "mean_logits"


class TokenScores(Protocol):
    """Per-token values (N,) float32 of the policy."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    mean_logits: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class KTOTable:
    """What the loss reads besides the policy's scores.

    branch: (N,) int64, the sequence of each scored token, ascending; labels: (S,) bool, True for good completions;
    ref_logprobs: (S,) float32, log π_ref(y).
    """

    branch: torch.Tensor
    labels: torch.Tensor
    ref_logprobs: torch.Tensor

    def logprobs(self, token_logprobs: torch.Tensor, rows: torch.Tensor | slice = ALL) -> torch.Tensor:
        """log π(y) (S,) from the log-probabilities (R,) of the tokens `rows`."""
        return token_logprobs.new_zeros(len(self.labels)).index_add(0, self.branch[rows], token_logprobs)

    def present(self, rows: torch.Tensor) -> torch.Tensor:
        """Which sequences (S,) bool have tokens among `rows`; those without any tokens go with the first token."""
        ones = torch.ones_like(self.branch)
        count = torch.zeros_like(self.labels, dtype=torch.int64)
        nowhere = count.index_add(0, self.branch, ones) == 0
        return (count.index_add(0, self.branch[rows], ones[rows]) > 0) | (nowhere & (rows[:1] == 0).any())


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """The mean of r (S,) over mismatched completions, 0-d and without gradient: z before it is bounded by 0.

    arXiv 2402.01306, section 4: completions of other prompts of the batch. TRL averages it over processes first.
    """
    return (logprobs.detach() - ref_logprobs).mean()


def kto_losses(logratios: torch.Tensor, labels: torch.Tensor, kl: torch.Tensor, config: KTOLossConfig) -> torch.Tensor:
    """The losses (S,) of sequences with log-ratios r (S,) and labels (S,) bool; kl is z, 0-d.

    good completions: w_d·(1 − σ(β·(r − z))), bad ones: w_u·(1 − σ(β·(z − r))). KTO: arXiv 2402.01306, Eq. 7.
    APO-zero for single completions, arXiv 2408.06266, Eq. 7, is the same with z = 0.
    """
    losses = torch.sigmoid(-config.beta * torch.where(labels, logratios - kl, kl - logratios))
    return torch.where(labels, config.desirable_weight * losses, config.undesirable_weight * losses)


def kto_loss_sum(
    scores: TokenScores,
    table: KTOTable,
    kl: torch.Tensor,
    config: KTOLossConfig,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of the losses that are numbers, 0-d; `count_losses` says how many those are.

    With `rows` (R,), the numbers of consecutive tokens that are all tokens of some sequences, `scores` holds only
    theirs, and the answer is those sequences' share.
    """
    logratios = table.logprobs(scores.logprobs, ALL if rows is None else rows) - table.ref_logprobs
    losses = kto_losses(logratios, table.labels, kl, config)
    if rows is not None:
        losses = torch.where(table.present(rows), losses, 0)
    return losses.nansum()


@torch.no_grad()
def count_losses(scores: TokenScores, table: KTOTable, kl: torch.Tensor) -> torch.Tensor:
    """How many losses are numbers, 0-d: a completion that both policies exclude has none, and the rest is averaged."""
    return (table.logprobs(scores.logprobs) - table.ref_logprobs - kl).isnan().logical_not().sum()


@torch.no_grad()
def kto_metrics(
    scores: TokenScores,
    table: KTOTable,
    kl: torch.Tensor,
    config: KTOLossConfig,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Metric]:
    """The metrics of a batch in TRL's order under TRL's names, left on the device.

    reduce: sums a tensor over processes; a margin is a difference of two means over all of them.
    """
    logprobs = table.logprobs(scores.logprobs)
    rewards = config.beta * (logprobs - table.ref_logprobs)
    good_tokens = table.labels[table.branch]
    entropy, mean_logits = required(scores.entropy), required(scores.mean_logits)
    one = torch.ones((), device=kl.device)
    metrics = {
        "kl": Metric(kl, one),
        "entropy": Metric(entropy.sum(), one * len(entropy)),
        "logits/chosen": _sum_where(good_tokens, mean_logits),
        "logits/rejected": _sum_where(~good_tokens, mean_logits),
    }
    for side, chosen in (("chosen", table.labels), ("rejected", ~table.labels)):
        metrics[f"rewards/{side}"] = _sum_where(chosen, rewards)
        metrics[f"logps/{side}"] = _sum_where(chosen, logprobs)
    parts = [part for side in ("chosen", "rejected") for part in metrics[f"rewards/{side}"]]
    good, num_good, bad, num_bad = reduce(torch.stack(parts)).unbind()
    both = (num_good * num_bad).clamp(max=1)
    metrics["rewards/margins"] = Metric(good / num_good.clamp(min=1) - bad / num_bad.clamp(min=1), both)
    return metrics


def _sum_where(mask: torch.Tensor, values: torch.Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0).nansum(), mask.sum(dtype=values.dtype))
