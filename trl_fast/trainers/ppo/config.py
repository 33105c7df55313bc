"""Defines PPOConfig: the arguments and defaults of TRL's last PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_fast.settings.choices import Choices, check_choice
from trl_fast.settings.older_names import older_name

from ..base.reference_config import ReferenceConfig

if TYPE_CHECKING:
    from trl_fast.rollout import SamplingSettings


@dataclass
class PPOConfig(ReferenceConfig):
    """Holds the arguments of PPOTrainer. Those of the loss are explained in `trl_fast.losses.ppo`.

    A step is one rollout of `batch_size` = per_device_train_batch_size · gradient_accumulation_steps ·
    num_mini_batches · processes prompts, and num_ppo_epochs · num_mini_batches updates of the weights on it. So
    logging_steps, save_steps, eval_steps, max_steps and the learning rate's schedule count rollouts.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names it.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate of AdamW."})
    logging_steps: float = field(
        default=1, metadata={"help": "Log every so many rollouts; below 1, that share of all of them."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Drop the dataset's other columns, which reward functions may read."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Has no effect: prompts are never cut, and completions have response_length."}
    )
    num_mini_batches: int = field(default=1, metadata={"help": "Updates that one pass over a rollout makes."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Completions to train on; unset: num_train_epochs times the dataset."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Completions that a process samples and scores at a time."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "How often completions are shown in the course of training."}
    )
    response_length: int = field(default=53, metadata={"help": "Tokens after which a completion is cut off."})
    stop_token: str | None = field(
        default=None,
        metadata={"help": "eos: completions end at the tokenizer's EOS token. Unset: see stop_token_id."},
    )
    stop_token_id: int | None = field(
        default=None,
        metadata={"help": "The token that completions end at; unset: all have response_length tokens."},
    )
    temperature: float = field(default=0.7, metadata={"help": "Divides the logits, in sampling and in the loss."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken from the score of completions without EOS token."}
    )
    sft_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "The policy to start from; for the command line."}
    )
    reward_model_path: str = field(
        default="EleutherAI/pythia-160m",
        metadata={"help": "The reward model, from which the value model starts too; for the command line."},
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a reward function that has not answered is an error; unset: none."},
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale a rollout's rewards to a variance of 1."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL divergence in the rewards."})
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "k1: log-ratio; k3: never negative, less variance.",
            "choices": Choices("trl_fast.losses.ppo:KL_ESTIMATORS"),
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Nats a completion that kl_coef is steered to, by arXiv 1909.08593; unset: it is fixed."},
    )
    kl_horizon: float = field(default=10_000.0, metadata={"help": "Episodes in which kl_coef follows kl_target."})
    cliprange: float = field(default=0.2, metadata={"help": "How far the probability ratio may leave 1."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far values may move in the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalized advantage estimation."})
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "With DeepSpeed ZeRO-3, gather the weights for generation."}
    )
    model_adapter_name: str | None = field(default=None, metadata={"help": "The adapter to train."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "The adapter that is the reference."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, for conversational prompts."}
    )
    log_completions: bool = field(default=False, metadata={"help": "Show and save completions with their scores."})
    num_completions_to_print: int | None = field(default=None, metadata={"help": "How many are shown; unset: all."})
    log_unique_prompts: bool = field(default=False, metadata={"help": "Show each prompt once."})
    exp_name: str | None = older_name(now="run_name")
    max_new_tokens: int | None = older_name(now="response_length")

    _VALID_DICT_FIELDS = ReferenceConfig._VALID_DICT_FIELDS + ["chat_template_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "kl_estimator")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True would change the rollouts too; set it to False and choose "
                "per_device_train_batch_size"
            )
        self._check_stop()
        self.sampling_settings()

    def _check_stop(self) -> None:
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError(
                f"stop_token={self.stop_token!r} and stop_token_id={self.stop_token_id} mean the same; give one"
            )
        if self.stop_token not in (None, "eos"):
            raise ValueError(
                f"stop_token={self.stop_token!r} is unknown; expected 'eos' or None, or give stop_token_id"
            )

    @property
    def local_mini_batch_size(self) -> int:
        """Returns the completions of one process in one update of the weights."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def local_batch_size(self) -> int:
        """Returns the completions of one process in one rollout."""
        return self.local_mini_batch_size * self.num_mini_batches

    @property
    def micro_batch_size(self) -> int:
        """Returns the completions of one backward pass, of all processes."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def mini_batch_size(self) -> int:
        """Returns the completions of one update of the weights, of all processes."""
        return self.local_mini_batch_size * self.world_size

    @property
    def batch_size(self) -> int:
        """Returns the completions of one rollout, of all processes."""
        return self.local_batch_size * self.world_size

    @property
    def num_total_batches(self) -> int:
        """Returns the number of rollouts; −1 until the trainer knows the dataset."""
        return self.max_steps

    def sampling_settings(self) -> SamplingSettings:
        """Returns the settings by which completions are sampled.

        Raises:
            ValueError: a value is out of its range.
        """
        # No end token is how generation is told to go on to the end.
        endless = self.stop_token is None and self.stop_token_id is None
        from trl_fast.rollout import SamplingSettings

        return SamplingSettings(
            max_completion_length=self.response_length,
            temperature=self.temperature,
            generation_kwargs={"eos_token_id": []} if endless else None,
        )
