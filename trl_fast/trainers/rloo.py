"""Defines RLOOTrainer, with TRL's interface and behaviour, on shared prompts and the fused head."""

from __future__ import annotations

from typing import ClassVar

import torch

from trl_fast.losses.advantages import Advantages, leave_one_out_advantages
from trl_fast.losses.policy_metrics import PolicyMetrics
from trl_fast.rollout.samples import Samples

from .base.balancing import NEVER, FreeDeal
from .base.trl_attributes import answers_to
from .online.group_trainer import GroupTrainer
from .online.trl_attributes import RLOO_ATTRIBUTES
from .rloo_config import RLOOConfig


@answers_to(RLOO_ATTRIBUTES)
class RLOOTrainer(GroupTrainer):
    """Trains by REINFORCE with leave-one-out baselines (arXiv 2402.14740); arguments as in GroupTrainer.

    Raises:
        ValueError, TypeError, NotImplementedError: as in GroupTrainer.
    """

    method = "rloo"
    config_class = RLOOConfig
    _METRICS: ClassVar[tuple[str, ...]] = ("entropy", "low_mean", "low_min", "high_mean", "high_max", "region_mean")

    def compute_advantages(self, samples: Samples, rewards: torch.Tensor) -> Advantages:
        """Computes how each reward, less the KL divergence, compares with its prompt's others; rewards: (N, R)."""
        penalties = None
        if self.args.beta != 0:
            samples.old_logprobs = self.score_samples(samples, self.policy_logprobs)
            reference = self.score_samples(samples, self.reference_logprobs)
            pairs = zip(samples.old_logprobs, reference, strict=True)
            log_ratios = [old - ref for old, ref in pairs]
            if samples.mask is not None:
                log_ratios = [own * mask for own, mask in zip(log_ratios, samples.mask, strict=True)]
            divergence = torch.stack([own.sum() for own in log_ratios]).masked_fill(samples.excluded, 0.0)
            divergence = divergence.to(rewards.device)
            tokens = samples.lengths.sum().to(rewards.device)
            self.record({"kl": (divergence.sum(), tokens)})
            penalties = self.args.beta * self.accelerator.gather(divergence)
        return leave_one_out_advantages(
            rewards,
            self.reward_functions.weights.to(rewards.device),
            self.group_size,
            penalties=penalties,
            clip_range=self.args.reward_clip_range,
            normalize=self.args.normalize_advantages,
        )

    def add_logprobs(self, samples: Samples) -> None:
        """Adds log-probabilities of the policy that sampled, where the advantages did not ask for them."""
        if samples.old_logprobs is None:
            samples.old_logprobs = self.score_samples(samples, self.policy_logprobs, everyone=False)

    # ---- the update

    @property
    def free_deal(self) -> FreeDeal:
        """Says that completions stay where they were scored, with a KL penalty in the rewards; else as the base."""
        if self.args.beta != 0:
            return FreeDeal(NEVER, "the KL penalty is scored in micro-batches before advantages are known")
        return super().free_deal

    @property
    def all_have_gradients(self) -> bool:
        """Says whether completions without advantage count too.

        With a KL penalty they are scored before advantages are known, and rarely are any without: all of them stay in
        the batches that were scored.
        """
        return super().all_have_gradients or self.args.beta != 0

    def record_policy(self, metrics: PolicyMetrics) -> None:
        """Records a micro-batch's metrics of the loss, in TRL's order for this method."""
        for name in self._METRICS:
            name = name if name == "entropy" else f"clip_ratio/{name}"
            if name in metrics.means:
                self.record({name: metrics.means[name]})
            else:
                self.recorder.record_extremes({name: metrics.by_sequence[name]})
