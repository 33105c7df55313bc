"""Defines GRPOConfig: TRL's arguments and defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_fast.settings.choices import check_choice, one_of
from trl_fast.settings.older_names import older_name

from .online.config import OnlineConfig
from .online.group_config import SCALES, scale_name

if TYPE_CHECKING:
    from trl_fast.losses.policy_gradient import PolicyLossConfig

logger = logging.getLogger(__name__)

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
CORRECTIONS = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
# Losses that sum over tokens, whatever completion they are of.
_BY_TOKEN = ("bnpo", "dr_grpo", "dapo", "cispo")


@dataclass
class GRPOConfig(OnlineConfig):
    """Holds the arguments of GRPOTrainer: completions of a prompt are sampled, rewarded and compared with each other.

    Set first: `output_dir`, `learning_rate`, `num_generations`, `max_completion_length`,
    `per_device_train_batch_size`; `loss_type`, `beta` and `epsilon`, which are explained in
    `trl_fast.losses.policy_gradient`; `use_vllm` to generate with vLLM.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    loss_type: str = one_of("trl_fast.losses.policy_gradient:LOSSES", default="dapo")
    """Loss, and what normalises it: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo or gmpo.

    grpo: the mean of each completion; bnpo: the tokens of the batch; dapo: those of the whole step; dr_grpo:
    max_completion_length. cispo clips the ratio's weight; sapo and vespo replace clipping by smooth weights; luspo
    weighs completions by their length; gmpo takes the geometric mean of clipped ratios (see GMPOConfig).
    """

    importance_sampling_level: str = one_of(("token", "sequence"), default="token")
    """Probability ratio of each token (token) or one of a completion (sequence, GSPO)."""

    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative (two-sided clipping). None: no bound."""

    multi_objective_aggregation: str = one_of(AGGREGATIONS, default="sum_then_normalize")
    """Whether several rewards are first summed or first normalised: sum_then_normalize, normalize_then_sum."""

    scale_rewards: str = one_of(SCALES, default="group")
    """Standard deviation that divides advantages: group (of a prompt's completions), batch or none."""

    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio, so that its gradient is unbiased."""

    sapo_temperature_neg: float = 1.05
    """sapo: temperature where the advantage is not positive."""

    sapo_temperature_pos: float = 1.0
    """sapo: temperature where the advantage is positive."""

    vespo_k_pos: float = 2.0
    """vespo: exponent k of the weight where the advantage is not negative."""

    vespo_lambda_pos: float = 3.0
    """vespo: decay lambda of the weight where the advantage is not negative."""

    vespo_k_neg: float = 3.0
    """vespo: exponent k of the weight where the advantage is negative."""

    vespo_lambda_neg: float = 2.0
    """vespo: decay lambda of the weight where the advantage is negative."""

    top_entropy_quantile: float = 1.0
    """Learn from this share of the tokens, those of the highest entropy; 1: from all."""

    off_policy_mask_threshold: float | None = None
    """Leave out completions with a negative advantage that drifted further than this, in nats. None: keep all."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss; 0: none."""

    use_adaptive_entropy: bool = False
    """Steer entropy_coef so that the entropy reaches entropy_target."""

    entropy_coef_min: float = 0.0
    """Least value of the steered entropy_coef."""

    entropy_coef_max: float = 1.0
    """Largest value of the steered entropy_coef."""

    entropy_coef_delta: float = 0.005
    """By how much a step moves the steered entropy_coef."""

    entropy_target: float = 0.2
    """Entropy in nats a token, below which the bonus is at work."""

    vllm_importance_sampling_correction: bool = True
    """Correct for the engine's log-probabilities not being the policy's."""

    vllm_importance_sampling_mode: str = one_of(CORRECTIONS, default="sequence_mask")
    """sequence_mask, sequence_truncate, token_mask or token_truncate.

    Ratios of tokens or of whole completions; those out of bounds are masked or truncated.
    """

    vllm_importance_sampling_clip_max: float | None = 3.0
    """Largest ratio of that correction. None: no bound."""

    vllm_importance_sampling_clip_min: float | None = None
    """Least ratio of that correction. None: no bound."""

    log_completions_hub_repo: str | None = None
    """Hub dataset to which logged completions are uploaded too, every two minutes. None: none.

    It is public unless hub_private_repo says otherwise.
    """

    max_tool_calling_iterations: int | None = None
    """Rounds of tool calls that a completion may have. None: any number."""

    tool_timeout: float | None = None
    """Seconds after which a tool that has not answered is an error for the model. None: no limit."""

    environment_timeout: float | None = None
    """Seconds after which an environment whose reset() or get_reward() has not answered is lost. None: no limit."""

    environment_workers: int = 1
    """Environments whose sync methods run at a time, in threads. 1: one after the other, as in TRL."""

    vllm_importance_sampling_cap: float | None = older_name(now="vllm_importance_sampling_clip_max")

    def __post_init__(self) -> None:
        self.scale_rewards = scale_name(self.scale_rewards)
        super().__post_init__()
        self.check_values()
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                f"log_completions_hub_repo={self.log_completions_hub_repo!r} uploads what log_completions writes, "
                "which is False; set it to True or leave the repository out"
            )
        self._warn_of_level()

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and those of the loss."""
        self.scale_rewards = scale_name(self.scale_rewards)
        super().check_values()
        check_choice(self, "scale_rewards")
        check_choice(self, "multi_objective_aggregation")
        check_choice(self, "importance_sampling_level")
        check_choice(self, "vllm_importance_sampling_mode")
        self._check_ratio_bounds()
        self.loss_config()

    def _warn_of_level(self) -> None:
        """Says where the loss and the level of its ratios are not what a paper has."""
        both = f"loss_type={self.loss_type!r} with importance_sampling_level={self.importance_sampling_level!r}"
        by_sequence = self.importance_sampling_level == "sequence"
        if self.loss_type == "luspo" and not by_sequence:
            logger.warning(f"{both}: LUSPO (arXiv 2602.05261) has one ratio a completion, the level 'sequence'.")
        elif self.loss_type == "vespo" and by_sequence:
            logger.warning(f"{both}: VESPO weighs whole completions by itself; leave the level at 'token'.")
        elif self.loss_type in _BY_TOKEN and by_sequence:
            logger.warning(
                f"{both}: the loss sums over tokens, so a completion counts by its length; GSPO (arXiv 2507.18071) is "
                "loss_type='grpo'."
            )

    def _check_ratio_bounds(self) -> None:
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} must be below vllm_importance_sampling_clip_max={high}"
            )
        if self.vllm_importance_sampling_mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} needs "
                "vllm_importance_sampling_clip_min or vllm_importance_sampling_clip_max"
            )
        if self.loss_type == "vespo" and self.corrects_sampling and "token" not in self.vllm_importance_sampling_mode:
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}: loss_type='vespo' needs "
                "'token_truncate' or 'token_mask'"
            )

    @property
    def corrects_sampling(self) -> bool:
        """Says whether the engine's log-probabilities are compared with the policy's."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def has_entropy_bonus(self) -> bool:
        """Says whether the entropy has a gradient."""
        return self.use_adaptive_entropy or self.entropy_coef != 0

    def loss_config(self) -> PolicyLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is unknown.
        """
        from trl_fast.losses.policy_gradient import PolicyLossConfig

        names = PolicyLossConfig.__dataclass_fields__
        return PolicyLossConfig.of(**{name: getattr(self, name) for name in names})
