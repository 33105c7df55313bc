"""Holds what PPO learns from, and makes the micro-batches of its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_fast.data import TokenBatch
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.losses.ppo import ppo_loss_inputs
from trl_fast.rollout.samples import Samples

from ..online.micro_batches import UpdateMaker
from .critic import Critic


@dataclass
class Experience(Samples):
    """Holds S completions with what the update aims at; float32 vectors on the CPU by completion, None until known.

    `losses.ppo` says what they are. Beside those of `Samples`, with `old_logprobs`:

    - `has_end` (S,) bool.
    - `token_advantages`: one for each token.
    - `values`, `returns`: one for each state.
    """

    has_end: torch.Tensor | None = None
    token_advantages: list[torch.Tensor] | None = None
    values: list[torch.Tensor] | None = None
    returns: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class PPOUpdate:
    """Holds a micro-batch: what the policy scores and its loss reads, and the same of the value model, (M,) each."""

    batch: TokenBatch
    loss_inputs: PolicyLossInputs
    state_batch: TokenBatch
    values: torch.Tensor
    returns: torch.Tensor


def make_update(experience: Experience, indices: Sequence[int], updates: UpdateMaker, critic: Critic) -> PPOUpdate:
    """Makes the micro-batch of these completions, those of one prompt next to each other."""
    part = experience.select(experience.grouped(indices))
    device = updates.device
    old_logprobs, advantages = part.flat("old_logprobs"), part.token_advantages
    values, returns = part.values, part.returns
    assert old_logprobs is not None and part.has_end is not None, "experience is whole before updates are made of it"
    assert advantages is not None and values is not None and returns is not None, "experience is whole"
    return PPOUpdate(
        batch=updates.token_batch(part),
        loss_inputs=ppo_loss_inputs(old_logprobs.to(device), torch.cat(advantages).to(device)),
        state_batch=critic.batch(part, part.has_end),
        values=torch.cat(values).to(device),
        returns=torch.cat(returns).to(device),
    )
