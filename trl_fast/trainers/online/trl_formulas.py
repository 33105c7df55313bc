"""Computes parts of GRPO's loss on padded tensors, as TRL's trainer offers them to its subclasses."""

from __future__ import annotations

import torch

from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.losses.policy_gradient import PolicyLossConfig, vespo_weights


def off_policy_mask(
    advantages: torch.Tensor,
    per_token_logps: torch.Tensor,
    sampling_per_token_logps: torch.Tensor,
    mask: torch.Tensor,
    off_policy_threshold: float,
) -> torch.Tensor:
    """Returns 1 (B, 1) where A ≥ 0 or the mean of log(π_sampler / π) is small, else 0; all others are (B, T)."""
    drift = (sampling_per_token_logps - per_token_logps.detach()).nan_to_num(nan=0.0) * mask
    mean = drift.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)
    return ((advantages >= 0) | (mean <= off_policy_threshold)).to(mask.dtype)


def gamma_weights(
    advantages: torch.Tensor,
    log_ratio_per_token: torch.Tensor,
    mask: torch.Tensor,
    importance_sampling_ratio: torch.Tensor | None,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> torch.Tensor:
    """Computes VESPO's weights (B, 1), or (B, T) for such advantages; all others are (B, T) float32."""
    rows, width = log_ratio_per_token.shape
    importance = importance_sampling_ratio
    inputs = PolicyLossInputs(
        branch=torch.arange(rows, device=mask.device).repeat_interleave(width),
        advantages=advantages[:, 0],
        weights=advantages[:, 0],
        mask=mask.flatten().float(),
        importance_ratios=None if importance is None else importance.expand(rows, width).flatten(),
        token_advantages=advantages.expand(rows, width).flatten(),
    )
    config = PolicyLossConfig(
        loss_type="vespo",
        vespo_k_pos=k_pos,
        vespo_lambda_pos=lambda_pos,
        vespo_k_neg=k_neg,
        vespo_lambda_neg=lambda_neg,
    )
    weights = vespo_weights(log_ratio_per_token.detach().flatten(), inputs, config)
    return weights.view(rows, width)[:, : advantages.shape[1]]
