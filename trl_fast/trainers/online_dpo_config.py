"""Defines OnlineDPOConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl_fast.settings.choices import check_choice, one_of

from .base.reference_config import ReferenceConfig
from .online.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from trl_fast.losses.dpo import DPOLossConfig


@dataclass
class OnlineDPOConfig(SamplingConfig, ReferenceConfig):
    """Holds the arguments of OnlineDPOTrainer: of two completions of a prompt the one of higher reward is preferred.

    Set first: `output_dir`, `learning_rate`, `max_new_tokens`, `per_device_train_batch_size` (prompts), `beta`;
    `missing_eos_penalty` for answers that come to an end; `use_vllm` to generate with vLLM.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    unit: ClassVar[str] = "prompts"
    length_setting: ClassVar[str] = "max_new_tokens"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("objective/scores", "objective/scores_margin", "objective/kl", "rewards/accuracies", "rewards/margins"),
        *("completions/mean_length", "val/contain_eos_token", "loss", "grad_norm", "learning_rate"),
    )

    learning_rate: float = 5e-7
    """Initial learning rate of AdamW."""

    disable_dropout: bool = True
    """Switch dropout off in the model and the reference."""

    reward_model_path: str | None = None
    """Reward model, hub name or folder, where no reward_funcs are given. None: reward_funcs."""

    max_new_tokens: int = 64
    """Tokens after which a completion is cut off."""

    max_completion_length: int | None = None
    """The same under its name in GRPO. None: max_new_tokens."""

    max_length: int | None = 512
    """Longest prompt + completion in the update, in tokens; longer prompts lose their beginning there.

    Completions are sampled after the whole prompt. Prompts with images are never cut. None: no limit.
    """

    temperature: float = 0.9
    """Divides the logits in sampling (not in the loss); higher: more varied completions."""

    missing_eos_penalty: float | None = None
    """Taken from the reward of completions without an end token. None: nothing."""

    beta: list[float] = field(default_factory=lambda: [0.1])
    """How much the policy is held to the reference: a number, or one for each epoch, the last one for all later ones.

    For loss_type='ipo' it is the paper's tau.
    """

    loss_type: str = one_of("trl_fast.losses.online_dpo:LOSSES", default="sigmoid")
    """Loss of a pair: sigmoid (DPO) or ipo."""

    vllm_gpu_memory_utilization: float = 0.55
    """Share of a GPU's memory for the colocated engine."""

    reward_weights: list[float] | None = None
    """Weights of the reward functions, one for each. None: 1 each."""

    reward_timeout: float | None = None
    """Seconds after which a reward function that has not answered is an error. None: no limit."""

    def __post_init__(self) -> None:
        if self.max_completion_length is not None:
            self.max_new_tokens = self.max_completion_length
        super().__post_init__()
        if isinstance(self.beta, (list, tuple)) and len(self.beta) == 1:
            number: Any = self.beta[0]
            self.beta = number
        if self.data_seed is None:
            # Each process samples by a seed of its own, but all read prompts in one order.
            self.data_seed = self.seed
        self.check_values()

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and those of the loss."""
        super().check_values()
        check_choice(self, "loss_type")
        if self.max_length is not None and self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no token of the prompt in max_length={self.max_length}; "
                "raise max_length, or set it to None"
            )
        if self.beta == []:
            raise ValueError("beta=[]: expected a number, or one for each epoch")

    def beta_of(self, epoch: float) -> float:
        """Returns beta in an epoch, which counts from 0 and may be a fraction."""
        if not isinstance(self.beta, (list, tuple)):
            return self.beta
        return self.beta[min(int(epoch), len(self.beta) - 1)]

    @property
    def completions_at_a_time(self) -> int:
        """Returns the completions that a process samples at a time: two of each prompt."""
        return 2 * self.per_device_train_batch_size

    def loss_config(self, epoch: float = 0.0) -> DPOLossConfig:
        """Returns the part of the arguments that the loss reads in an epoch.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.online_dpo import online_dpo_loss_config

        return online_dpo_loss_config(self.loss_type, self.beta_of(epoch))
