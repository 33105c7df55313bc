"""What PPO learns from: completions with their advantages, values and returns, and the micro-batches of the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_fast.data import TokenBatch
from trl_fast.losses.policy_gradient import PolicyTable
from trl_fast.losses.ppo import ppo_table
from trl_fast.rollout.samples import Samples

from ..online.micro_batches import UpdateMaker
from .critic import Critic


@dataclass(frozen=True)
class Experience:
    """S completions, with float32 vectors on the CPU by completion; `losses.ppo` says what they are.

    - `samples`: with `old_logprobs`.
    - `has_end` (S,) bool.
    - `advantages`: one for each token; `values` and `returns`: one for each state.
    """

    samples: Samples
    has_end: torch.Tensor
    advantages: list[torch.Tensor]
    values: list[torch.Tensor]
    returns: list[torch.Tensor]

    def select(self, indices: Sequence[int]) -> Experience:
        """The completions of these numbers, in this order."""
        parts = {name: [getattr(self, name)[i] for i in indices] for name in ("advantages", "values", "returns")}
        return Experience(self.samples.select(indices), self.has_end[list(indices)], **parts)


@dataclass(frozen=True)
class PPOUpdate:
    """A micro-batch: what the policy scores and its loss reads, and the same of the value model, (M,) each."""

    batch: TokenBatch
    table: PolicyTable
    state_batch: TokenBatch
    values: torch.Tensor
    returns: torch.Tensor


def make_update(experience: Experience, indices: Sequence[int], updates: UpdateMaker, critic: Critic) -> PPOUpdate:
    """The micro-batch of these completions, those of one prompt next to each other."""
    part = experience.select(indices)
    part = part.select(part.samples.grouped(range(len(indices))))
    device = updates.device
    old_logprobs = part.samples.flat("old_logprobs").to(device)
    return PPOUpdate(
        batch=updates.token_batch(part.samples),
        table=ppo_table(old_logprobs, torch.cat(part.advantages).to(device)),
        state_batch=critic.batch(part.samples, part.has_end),
        values=torch.cat(part.values).to(device),
        returns=torch.cat(part.returns).to(device),
    )
