"""Defines RLOOConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .online.config import OnlineConfig

if TYPE_CHECKING:
    from trl_fast.losses.policy_gradient import PolicyLossConfig


@dataclass
class RLOOConfig(OnlineConfig):
    """Holds the arguments of RLOOTrainer: a completion's reward is compared with the mean of the prompt's others.

    Set first: `output_dir`, `learning_rate`, `num_generations`, `max_completion_length`,
    `per_device_train_batch_size`, `beta`; `use_vllm` to generate with vLLM.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    num_generations: int = 2
    """Completions for each prompt."""

    beta: float = 0.05
    """Weight of the KL divergence from the reference in the rewards; 0: none."""

    normalize_advantages: bool = False
    """Whiten the advantages of a generation: mean 0, variance 1."""

    reward_clip_range: tuple[float, float] | None = None
    """Lower and upper bound of the summed rewards, before the KL divergence is taken off. None: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_values()

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and those of the advantages."""
        super().check_values()
        bounds = self.reward_clip_range
        if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ValueError(f"reward_clip_range={bounds}: expected two numbers, the lower one first")

    def loss_config(self) -> PolicyLossConfig:
        """Returns the loss: the clipped ratio of whole completions, each of which counts alike."""
        from trl_fast.losses.policy_gradient import PolicyLossConfig

        return PolicyLossConfig.of(
            loss_type="grpo",
            importance_sampling_level="product",
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
        )
