"""Computes the loss and metrics of reward models from a reward for each sequence.

Notation of the docstrings: P pairs, S = 2P sequences (the chosen one of pair i is sequence 2i, the rejected one
2i + 1), r their rewards; subscripts c and r stand for chosen and rejected; σ is the logistic function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .mean_metric import Metric


def reward_loss(
    rewards: torch.Tensor, margins: torch.Tensor | None = None, center_rewards_coefficient: float | None = None
) -> torch.Tensor:
    """Computes the mean over pairs of −log σ(r_c − r_r − m) + c·(r_c + r_r)², 0-d, in the dtype of `rewards`.

    The first term is the likelihood of the preference under the Bradley-Terry model (arXiv 2203.02155, Eq. 1), with
    the margin m of arXiv 2307.09288, Eq. 2. The second keeps the rewards around zero (arXiv 2312.09244, Eq. 2).

    Args:
        rewards: (S,) float.
        margins: (P,) float, by how much chosen should win; None: 0.
        center_rewards_coefficient: c; None: 0.
    """
    chosen, rejected = rewards.view(-1, 2).unbind(dim=1)
    lead = chosen - rejected
    loss = -F.logsigmoid(lead if margins is None else lead - margins).mean()
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square().mean()
    return loss


@torch.no_grad()
def reward_metrics(rewards: torch.Tensor) -> dict[str, Metric]:
    """Computes the least, mean and largest reward of (S,), the share of pairs with r_c > r_r, and their mean margin.

    The names and their order are TRL's. All are left on the device.
    """
    chosen, rejected = rewards.view(-1, 2).unbind(dim=1)
    one = torch.ones((), device=rewards.device)
    return {
        "min_reward": Metric(rewards.min(), one),
        "mean_reward": Metric(rewards.mean(), one),
        "max_reward": Metric(rewards.max(), one),
        "accuracy": Metric((chosen > rejected).float().mean(), one),
        "margin": Metric((chosen - rejected).mean(), one),
    }
