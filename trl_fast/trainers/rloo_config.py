"""Defines RLOOConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .online.config import OnlineConfig

if TYPE_CHECKING:
    from trl_fast.losses.policy_gradient import PolicyLossConfig


@dataclass
class RLOOConfig(OnlineConfig):
    """Holds the arguments of RLOOTrainer.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    num_generations: int | None = field(default=2, metadata={"help": "Completions for each prompt."})
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL divergence in the rewards; 0: none."})
    normalize_advantages: bool = field(default=False, metadata={"help": "Whiten the advantages of a generation."})
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Bounds of the summed rewards, before the KL divergence is taken off."}
    )

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
