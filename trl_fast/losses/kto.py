"""Computes the loss and metrics of Kahneman-Tversky optimisation.

Notation of the docstrings: S sequences, each a prompt and one completion y that is labelled good or bad, with N scored
tokens; log π(y) is the sum of a completion's token log-probabilities under the policy, log π_ref(y) under the
reference; r = log π(y) − log π_ref(y); z is the reference point, an estimate of the policy's KL divergence from the
reference; σ is the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_fast.ops import TokenScores
from trl_fast.ops.stable_functions import logistic
from trl_fast.ops.token_scores import required
from trl_fast.settings.ranges import check_ranges

from .loss_inputs import ALL, KTOLossInputs
from .mean_metric import Metric

LOSSES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True)
class KTOLossConfig:
    """Holds the settings of the loss. The fields have the names, meanings and defaults of `KTOConfig`.

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
        """Says whether the loss has a reference point other than 0, for which mismatched completions are scored."""
        return self.loss_type == "kto"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Returns the per-token values that the metrics read, by the names that `linear_logprob` knows them under."""
        return "logprobs", "entropy", "mean_logits"


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Computes the mean of r (S,) over mismatched completions, 0-d, without gradient: z before its bound of 0.

    arXiv 2402.01306, section 4: completions of other prompts of the batch. TRL averages it over processes first.
    """
    return (logprobs.detach() - ref_logprobs).mean()


def kto_losses(logratios: torch.Tensor, labels: torch.Tensor, kl: torch.Tensor, config: KTOLossConfig) -> torch.Tensor:
    """Computes the losses (S,) of sequences with log-ratios r (S,) and labels (S,) bool; kl is z, 0-d.

    good completions: w_d·(1 − σ(β·(r − z))), bad ones: w_u·(1 − σ(β·(z − r))). KTO: arXiv 2402.01306, Eq. 7.
    APO-zero for single completions, arXiv 2408.06266, Eq. 7, is the same with z = 0.
    """
    losses = logistic(-config.beta * torch.where(labels, logratios - kl, kl - logratios))
    return torch.where(labels, config.desirable_weight * losses, config.undesirable_weight * losses)


def kto_loss_sum(
    scores: TokenScores,
    inputs: KTOLossInputs,
    kl: torch.Tensor,
    config: KTOLossConfig,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums the losses that are not NaN, 0-d; `count_losses` says how many those are.

    With `rows` (R,), the numbers of consecutive tokens that are all tokens of some sequences, `scores` holds only
    theirs, and the answer is those sequences' share.
    """
    logratios = inputs.sequence_logprobs(scores.logprobs, ALL if rows is None else rows) - inputs.ref_logprobs
    losses = kto_losses(logratios, inputs.labels, kl, config)
    if rows is not None:
        losses = torch.where(inputs.has_rows(rows), losses, 0)
    return losses.nansum()


@torch.no_grad()
def count_losses(scores: TokenScores, inputs: KTOLossInputs, kl: torch.Tensor) -> torch.Tensor:
    """Counts the losses (S,) that are not NaN, 0-d; kl is z, 0-d.

    A completion whose log-probability is −inf under both policies has none; the others are averaged.
    """
    return (inputs.sequence_logprobs(scores.logprobs) - inputs.ref_logprobs - kl).isnan().logical_not().sum()


@torch.no_grad()
def kto_metrics(
    scores: TokenScores,
    inputs: KTOLossInputs,
    kl: torch.Tensor,
    config: KTOLossConfig,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Metric]:
    """Computes the metrics of a batch in TRL's order under TRL's names, left on the device.

    scores: values (N,) float32; kl: z, 0-d float32.

    reduce: sums a tensor over processes; a margin is a difference of two means over all of them.
    """
    logprobs = inputs.sequence_logprobs(scores.logprobs)
    rewards = config.beta * (logprobs - inputs.ref_logprobs)
    good_tokens = inputs.labels[inputs.branch]
    entropy, mean_logits = required(scores.entropy), required(scores.mean_logits)
    one = torch.ones((), device=kl.device)
    metrics = {
        "kl": Metric(kl, one),
        "entropy": Metric(entropy.sum(), one * len(entropy)),
        "logits/chosen": _sum_where(good_tokens, mean_logits),
        "logits/rejected": _sum_where(~good_tokens, mean_logits),
    }
    for side, chosen in (("chosen", inputs.labels), ("rejected", ~inputs.labels)):
        metrics[f"rewards/{side}"] = _sum_where(chosen, rewards)
        metrics[f"logps/{side}"] = _sum_where(chosen, logprobs)
    parts = [part for side in ("chosen", "rejected") for part in metrics[f"rewards/{side}"]]
    good, num_good, bad, num_bad = reduce(torch.stack(parts)).unbind()
    both = (num_good * num_bad).clamp(max=1)
    metrics["rewards/margins"] = Metric(good / num_good.clamp(min=1) - bad / num_bad.clamp(min=1), both)
    return metrics


def _sum_where(mask: torch.Tensor, values: torch.Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0).nansum(), mask.sum(dtype=values.dtype))
