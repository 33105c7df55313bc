"""Defines GRPOTrainer, with TRL's interface and behaviour, on shared prompts and the fused head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_fast.losses.advantages import Advantages, group_advantages
from trl_fast.losses.importance_sampling import importance_ratios
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.losses.policy_gradient import LOSSES, grpo_loss
from trl_fast.ops import TokenScores
from trl_fast.rollout.samples import Samples

from .base.trl_attributes import answers_to
from .checkpoints.parts import NumbersPart
from .grpo_config import GRPOConfig
from .online.completions_log import upload_completions
from .online.entropy_controller import EntropyController
from .online.group_trainer import GroupTrainer
from .online.micro_batches import Update
from .online.trl_attributes import GRPO_ATTRIBUTES
from .online.trl_formulas import gamma_weights, off_policy_mask
from .online.trl_hooks import TRLHook

# TRL's name.
ENTROPY_STATE_FILE = "entropy_ctrl_state.json"


@answers_to(GRPO_ATTRIBUTES)
class GRPOTrainer(GroupTrainer):
    """Trains by Group Relative Policy Optimization (arXiv 2402.03300) and its relatives; arguments as in GroupTrainer.

    Raises:
        ValueError, TypeError, NotImplementedError: as in GroupTrainer.
    """

    method = "grpo"
    config_class = GRPOConfig
    loss_is_scaled_for_ga = True
    has_tools = True
    get_high_entropy_mask = TRLHook("high_entropy_mask")
    get_off_policy_mask = staticmethod(off_policy_mask)
    get_gamma_weights = staticmethod(gamma_weights)

    def set_up_method(self) -> None:
        """Makes the controller of the entropy bonus, and starts uploads of completions, where they are asked for."""
        config = self.args
        self.entropy: EntropyController | None = None
        if config.has_entropy_bonus:
            self.entropy = EntropyController(
                config.entropy_coef,
                delta=config.entropy_coef_delta,
                low=config.entropy_coef_min,
                high=config.entropy_coef_max,
                target=config.entropy_target if config.use_adaptive_entropy else torch.inf,
            )
        if config.use_adaptive_entropy:
            names = {"entropy_coef": "coefficient", "last_world_entropy": "last_entropy"}
            self.checkpoints.parts.append(NumbersPart(ENTROPY_STATE_FILE, self.entropy, names))
        if config.log_completions_hub_repo is not None and self.accelerator.is_main_process:
            self.uploads = upload_completions(
                Path(config.output_dir) / "completions",
                config.log_completions_hub_repo,
                private=config.hub_private_repo,
                token=config.hub_token,
            )

    # ---- the rollout

    def compute_advantages(self, samples: Samples, rewards: torch.Tensor) -> Advantages:
        """Computes how each completion's reward compares with those of its group; rewards: (N, R), as in the base."""
        return group_advantages(
            rewards,
            self.reward_functions.weights.to(rewards.device),
            self.group_size,
            scale_rewards=self.args.scale_rewards,
            aggregation=self.args.multi_objective_aggregation,
        )

    def add_logprobs(self, samples: Samples) -> None:
        """Adds log-probabilities of the policy that sampled, where the update's is another, and of the reference."""
        args = self.args
        if args.corrects_sampling:
            samples.old_logprobs = self.score_samples(samples, self.policy_logprobs)
            self._correct(samples)
        elif not args.is_on_policy:
            samples.old_logprobs = self.score_samples(samples, self.policy_logprobs, everyone=False)
        if args.beta != 0:
            samples.ref_logprobs = self.score_samples(samples, self.reference_logprobs)

    def _correct(self, samples: Samples) -> None:
        """Adds importance ratios of the policy to the engine that sampled, and records their metrics."""
        args = self.args
        if samples.sampling_logprobs is None:
            raise ValueError(
                "vllm_importance_sampling_correction=True needs the engine's log-probs, but the rollout has none; "
                "set it to False"
            )
        old, sampled, counts = (samples.flat(name) for name in ("old_logprobs", "sampling_logprobs", "mask"))
        branch = torch.arange(len(samples)).repeat_interleave(torch.tensor([*map(len, samples.completion_ids)]))
        counts = torch.ones_like(old) if counts is None else counts
        counts = counts * ~samples.excluded[branch]
        found = importance_ratios(
            *(old, sampled, branch, len(samples)),
            mode=args.vllm_importance_sampling_mode,
            low=args.vllm_importance_sampling_clip_min,
            high=args.vllm_importance_sampling_clip_max,
            counts=counts,
        )
        samples.importance_ratios = samples.split(found.ratios)
        gap = (old - sampled).abs()[counts > 0]
        self.recorder.record_statistics("sampling/sampling_logp_difference/{}", gap[~gap.isnan()], ("mean", "max"))
        self.recorder.record_statistics("sampling/importance_sampling_ratio/{}", found.shown, ("min", "mean", "max"))

    # ---- the update

    @property
    def order_is_free(self) -> bool:
        """Says whether completions may move to another micro-batch: no loss term depends on the others in it."""
        bonus, config = self.args.has_entropy_bonus, self.loss_config
        by_batch = config.loss_type == "bnpo" or config.scope == "batch" or bonus
        return super().order_is_free and not by_batch

    @property
    def all_have_gradients(self) -> bool:
        """Says whether completions without advantage count too: in a KL or entropy term, or in a shared divisor."""
        return super().all_have_gradients or self.args.beta != 0 or not self.order_is_free

    @property
    def loss_keys(self) -> tuple[str, ...]:
        """Returns TRL's keys of a batch's values a token that the loss reads."""
        args = self.args
        reads = {
            "old_per_token_logps": True,
            "ref_per_token_logps": args.beta != 0,
            "sampling_per_token_logps": args.off_policy_mask_threshold is not None,
            "importance_sampling_ratio": args.corrects_sampling or args.loss_type == "vespo",
        }
        return tuple(name for name, is_read in reads.items() if is_read)

    def loss_options(self, inputs: Update) -> dict[str, Any]:
        """Returns the weight of the entropy bonus, and what chooses the tokens that the policy terms and it act on."""
        options: dict[str, Any] = {}
        if self.entropy is not None:
            options["entropy_coef"] = self.entropy.applied / self.accumulation_steps
        if self.loss_config.top_entropy_quantile < 1:
            options["entropy_mask"] = partial(self._high_entropy, loss_inputs=inputs.loss_inputs)
        return options

    def _high_entropy(self, entropies: torch.Tensor, loss_inputs: PolicyLossInputs) -> torch.Tensor:
        """Returns 1 for the tokens (N,) whose entropy is among the highest of all processes' tokens, else 0."""
        mask, threshold = loss_inputs.mask, 1 - self.loss_config.top_entropy_quantile
        mask = torch.ones_like(entropies) if mask is None else mask
        if not self.trl_hooks.has("get_high_entropy_mask"):
            return self.get_high_entropy_mask(entropies, mask, threshold).float()
        counts = loss_inputs.branch.bincount().tolist()
        rows, masks = (pad_sequence(values.split(counts), batch_first=True) for values in (entropies, mask))
        present = pad_sequence(torch.ones_like(mask).split(counts), batch_first=True).bool()
        return self.get_high_entropy_mask(rows, masks, threshold).float()[present]

    @torch.no_grad()
    def record_extra(self, scores: TokenScores, inputs: Update) -> None:
        """Records the loss without the bonus, and the bonus's weight, which moves after the last micro-batch."""
        if self.entropy is None:
            return
        loss_inputs, config = inputs.loss_inputs, self.loss_config
        chosen = self.loss_options(inputs).get("entropy_mask")
        loss = grpo_loss(scores, loss_inputs, config, entropy_mask=chosen)
        policy = loss if LOSSES[config.loss_type].over_whole_step else loss * self.accumulation_steps
        self.record({"policy_loss": (policy, torch.ones_like(policy))})
        if not self.model.training:
            return
        if self.args.use_adaptive_entropy:
            acted_on = loss_inputs.masked(
                torch.ones_like(scores.entropy) if chosen is None else chosen(scores.entropy)
            )
            self.entropy.add((scores.entropy * acted_on).sum(), acted_on.sum())
        if self.accelerator.sync_gradients:
            if self.args.use_adaptive_entropy:
                self.entropy.step(lambda window: self.accelerator.reduce(window, "sum"))
            self.recorder.record_values({"entropy_coef": self.entropy.coefficient})
