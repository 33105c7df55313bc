"""Defines A2POConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base.reference_config import ReferenceConfig
from .online.sampling_config import SamplingConfig


@dataclass
class A2POConfig(SamplingConfig, ReferenceConfig):
    """Holds the arguments of A2POTrainer: prompts' values are estimated first, then one completion each is learned.

    Set first: `output_dir`, `learning_rate`, `max_completion_length`, `per_device_train_batch_size` (prompts),
    `beta1`, `beta2` and `num_value_samples`; `use_vllm` to generate with vLLM.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    unit: ClassVar[str] = "prompts"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("reward", "v_star", "advantage", "implicit_reward", "completions/mean_length"),
        *("loss", "grad_norm", "learning_rate"),
    )

    learning_rate: float = 5e-5
    """Initial learning rate of AdamW."""

    max_prompt_length: int | None = 512
    """Longest prompt in tokens; longer ones lose their beginning. None: no limit."""

    max_completion_length: int | None = 256
    """Tokens after which a completion is cut off."""

    temperature: float = 1.0
    """Divides the logits in sampling (not in the loss); higher: more varied completions."""

    num_value_samples: int = 8
    """Completions of the reference for each prompt, whose rewards tell the prompt's value."""

    beta1: float = 0.5
    """Temperature of the KL divergence in the estimate of the values."""

    filter_all_incorrect: bool = True
    """Leave out training prompts for which no completion of the reference earned a reward."""

    beta2: float = 1e-3
    """Temperature of the KL divergence in the loss."""

    reward_weights: list[float] | None = None
    """Weights of the reward functions, one for each. None: 1 each."""

    reward_timeout: float | None = None
    """Seconds after which a reward function that has not answered is an error. None: no limit."""

    def __post_init__(self) -> None:
        if self.top_k is None:  # TRL's default here
            self.top_k = 0
        super().__post_init__()
        if self.data_seed is None:
            # Each process samples by a seed of its own, but all read prompts in one order.
            self.data_seed = self.seed
        if self.sync_ref_model:
            raise ValueError(
                "sync_ref_model=True: the prompts' values are those of the reference at the start; set it to False"
            )

    @property
    def completions_at_a_time(self) -> int:
        """Returns the completions that a process samples at a time, at most: those of the values."""
        return self.per_device_train_batch_size * self.num_value_samples
