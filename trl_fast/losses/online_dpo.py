"""Computes the loss and the metrics of Online DPO (arXiv 2402.04792): DPO of the policy's own completions.

P pairs, S = 2P sequences: of pair i, sequence 2i has the higher reward, 2i + 1 the lower one. The loss is DPO's, of
`trl_fast.losses.dpo`; `ipo` reads sums over tokens, as IPO's paper does (arXiv 2310.12036), where DPO's reads means.
"""

from __future__ import annotations

import torch

from .dpo import DPOLossConfig
from .loss_inputs import PreferenceLossInputs
from .mean_metric import Metric

LOSSES = ("sigmoid", "ipo")


def online_dpo_loss_config(loss_type: str, beta: float) -> DPOLossConfig:
    """Returns the loss's settings.

    Raises:
        ValueError: loss_type is none of LOSSES, or beta out of range.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; expected one of {', '.join(LOSSES)}")
    return DPOLossConfig(loss_type=(loss_type,), beta=beta)


def online_loss_inputs(
    branch: torch.Tensor, num_sequences: int, has_score: torch.Tensor | None = None
) -> PreferenceLossInputs:
    """Returns what the loss reads of N tokens in S sequences.

    Args:
        branch: (N,) int64, the sequence of each token. Lengths are 1, so that nothing is divided by them.
        num_sequences: S.
        has_score: (S,) bool; a pair of which a sequence has none counts 0. None: all have one.
    """
    weights = None if has_score is None else has_score.view(-1, 2).all(1).float()
    return PreferenceLossInputs(branch, torch.zeros_like(branch), branch.new_ones(num_sequences), weights)


@torch.no_grad()
def online_dpo_metrics(
    token_logprobs: torch.Tensor,
    inputs: PreferenceLossInputs,
    ref_logprobs: torch.Tensor,
    rewards: torch.Tensor,
    has_end: torch.Tensor,
    beta: float,
) -> dict[str, Metric]:
    """Computes the metrics of a micro-batch in TRL's order under TRL's names, left on the device.

    Args:
        token_logprobs: (N,) float32.
        inputs: of `online_loss_inputs`.
        ref_logprobs: (N,) float32, under the reference.
        rewards: (S,) float32, what the sequences are ordered by.
        has_end: (S,) float32, 1 for the sequences that hold an end token.
        beta: the loss's.
    """
    logprobs = inputs.sequence_logprobs(token_logprobs)
    # Summed token by token: a difference of two large sums would lose what float32 rounds of each.
    kl = inputs.sums(token_logprobs - ref_logprobs)
    implicit = beta * kl
    margins = implicit[0::2] - implicit[1::2]
    values = {
        "objective/kl": kl,
        "objective/entropy": -logprobs,
        "objective/non_score_reward": -implicit,
        "rewards/chosen": implicit[0::2],
        "rewards/rejected": implicit[1::2],
        "rewards/accuracies": (margins > 0).float(),
        "rewards/margins": margins,
        "logps/chosen": logprobs[0::2],
        "logps/rejected": logprobs[1::2],
        "val/contain_eos_token": has_end,
        "beta": torch.full_like(margins, beta),
        "objective/rlhf_reward": rewards - implicit,
        "objective/scores_margin": rewards[0::2] - rewards[1::2],
        "objective/scores": rewards,
    }
    return {name: Metric.over(value.sum(), len(value)) for name, value in values.items()}
