"""Computes the loss and metrics of binary classifier optimisation.

Notation of the docstrings: S sequences, each a prompt and one completion y that is labelled good or bad, with N scored
tokens; r = β·(log π(y) − log π_ref(y)) is the reward of y; δ is the reward shift, the mean of the rewards of all
completions that were trained on so far; σ is the logistic function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trl_fast.ops import TokenScores
from trl_fast.ops.token_scores import required
from trl_fast.settings.ranges import check_ranges

from .loss_inputs import KTOLossInputs
from .mean_metric import Metric


@dataclass(frozen=True)
class BCOLossConfig:
    """Holds the settings of the loss. The fields have the names, meanings and defaults of `BCOConfig`.

    Raises:
        ValueError: a number is out of range.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Returns the per-token values that the metrics read, by the names that `linear_logprob` knows them under."""
        return "logprobs", "mean_logits"


def bco_rewards(logprobs: torch.Tensor, inputs: KTOLossInputs, config: BCOLossConfig) -> torch.Tensor:
    """Computes the rewards r (S,) from the log-probabilities (N,) of all scored tokens."""
    return config.beta * (inputs.sequence_logprobs(logprobs) - inputs.ref_logprobs)


def bco_losses(rewards: torch.Tensor, labels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Computes the losses (S,) of sequences with rewards r (S,) and labels (S,) bool; shift is δ, 0-d.

    Good completions: −log σ(r − δ), bad ones: −log σ(δ − r). BCO, arXiv 2404.04656, Eqs. 9 and 10.
    """
    return -F.logsigmoid(torch.where(labels, rewards - shift, shift - rewards))


def bco_loss(
    rewards: torch.Tensor, labels: torch.Tensor, shift: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Averages the losses that are not NaN, 0-d; see `bco_losses`.

    weights: (S,) float32, the density ratio of each prompt; None: 1 each. TRL's: they multiply the losses of bad
    completions, and the mean is that of all.
    """
    losses = bco_losses(rewards, labels, shift)
    return (losses if weights is None else weights * losses).nanmean()


@torch.no_grad()
def bco_metrics(
    scores: TokenScores, inputs: KTOLossInputs, shift: torch.Tensor, config: BCOLossConfig
) -> dict[str, Metric]:
    """Computes the metrics of a batch under TRL's names, left on the device.

    scores: values (N,) float32; shift: δ, 0-d float32.
    """
    logprobs = inputs.sequence_logprobs(scores.logprobs)
    rewards, good_tokens = bco_rewards(scores.logprobs, inputs, config), inputs.labels[inputs.branch]
    metrics = {}
    for side, wanted in (("chosen", True), ("rejected", False)):
        metrics[f"rewards/{side}"] = _sum_where(inputs.labels == wanted, rewards)
        metrics[f"logps/{side}"] = _sum_where(inputs.labels == wanted, logprobs)
        metrics[f"logits/{side}"] = _sum_where(good_tokens == wanted, required(scores.mean_logits))
    return {**metrics, "delta": Metric(shift, torch.ones_like(shift))}


def _sum_where(mask: torch.Tensor, values: torch.Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0).nansum(), mask.sum(dtype=values.dtype))
