"""Defines GRPOConfig: TRL's arguments and defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_fast.settings.choices import Choices, check_choice
from trl_fast.settings.older_names import older_name

from .online.config import OnlineConfig

if TYPE_CHECKING:
    from trl_fast.losses.policy_gradient import PolicyLossConfig

logger = logging.getLogger(__name__)

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
CORRECTIONS = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
# Losses that sum over tokens, whatever completion they are of.
_BY_TOKEN = ("bnpo", "dr_grpo", "dapo", "cispo")


@dataclass
class GRPOConfig(OnlineConfig):
    """Holds the arguments of GRPOTrainer. Those of the loss are explained in `trl_fast.losses.policy_gradient`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "The loss and what normalises it.",
            "choices": Choices("trl_fast.losses.policy_gradient:LOSSES"),
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={"help": "sequence: one ratio a completion (GSPO).", "choices": ["token", "sequence"]},
    )
    delta: float | None = field(default=None, metadata={"help": "Bound of the ratio where the advantage is negative."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={"help": "Whether rewards are summed or normalised first.", "choices": list(AGGREGATIONS)},
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Whose standard deviation divides advantages.", "choices": list(SCALES)},
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL estimate by the ratio, so that its gradient is unbiased."}
    )
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "sapo: temperature for A <= 0."})
    sapo_temperature_pos: float = field(default=1.0, metadata={"help": "sapo: temperature for A > 0."})
    vespo_k_pos: float = field(default=2.0, metadata={"help": "vespo: k for A >= 0."})
    vespo_lambda_pos: float = field(default=3.0, metadata={"help": "vespo: lambda for A >= 0."})
    vespo_k_neg: float = field(default=3.0, metadata={"help": "vespo: k for A < 0."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "vespo: lambda for A < 0."})
    top_entropy_quantile: float = field(
        default=1.0, metadata={"help": "Learn from this share of the tokens, those of the highest entropy."}
    )
    off_policy_mask_threshold: float | None = field(
        default=None, metadata={"help": "Leave out completions with A < 0 that drifted further than this, in nats."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    use_adaptive_entropy: bool = field(default=False, metadata={"help": "Steer that weight to entropy_target."})
    entropy_coef_min: float = field(default=0.0, metadata={"help": "The least adaptive weight."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "The largest adaptive weight."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "By how much a step moves the weight."})
    entropy_target: float = field(default=0.2, metadata={"help": "Entropy below which the bonus is at work."})
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Correct for the engine's log-probs not being the policy's."}
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={"help": "Ratios of tokens or completions; truncated or masked.", "choices": list(CORRECTIONS)},
    )
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "The largest ratio."})
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "The least ratio."})
    log_completions_hub_repo: str | None = field(
        default=None,
        metadata={
            "help": "Also upload them to this Hub repository of data sets, every two minutes; it is public unless "
            "hub_private_repo says otherwise."
        },
    )
    max_tool_calling_iterations: int | None = field(
        default=None, metadata={"help": "Rounds of tool calls a completion may have; unset: any number."}
    )
    tool_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a tool that has not answered is an error for the model; unset: none."},
    )
    vllm_importance_sampling_cap: float | None = older_name(now="vllm_importance_sampling_clip_max")

    def __post_init__(self) -> None:
        self._name_scale()
        super().__post_init__()
        self.check_values()
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                f"log_completions_hub_repo={self.log_completions_hub_repo!r} uploads what log_completions writes, "
                "which is False; set it to True or leave the repository out"
            )
        self._warn_of_level()

    def _name_scale(self) -> None:
        # The command line gives a string.
        names = {True: "group", False: "none", "true": "group", "false": "none"}
        scale = self.scale_rewards
        self.scale_rewards = names.get(scale.lower() if isinstance(scale, str) else scale, scale)

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and those of the loss."""
        self._name_scale()
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
