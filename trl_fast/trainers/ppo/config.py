"""Defines PPOConfig: the arguments and defaults of TRL's last PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trl_fast.settings.choices import check_choice, one_of
from trl_fast.settings.older_names import older_name

from ..base.reference_config import ReferenceConfig

if TYPE_CHECKING:
    from trl_fast.rollout import SamplingSettings


@dataclass
class PPOConfig(ReferenceConfig):
    """Holds the arguments of PPOTrainer: sampled completions are scored by a reward model, beside a value model.

    Set first: `output_dir`, `learning_rate`, `total_episodes`, `response_length`, `per_device_train_batch_size`;
    `kl_coef` and `cliprange`, which are explained in `trl_fast.losses.ppo`.

    A step is one rollout of `batch_size` = per_device_train_batch_size · gradient_accumulation_steps ·
    num_mini_batches · processes prompts, and num_ppo_epochs · num_mini_batches updates of the weights on it. So
    logging_steps, save_steps, eval_steps, max_steps and the learning rate's schedule count rollouts.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names it.
    """

    unit: ClassVar[str] = "completions"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("objective/scores", "objective/rlhf_reward", "objective/kl", "objective/entropy"),
        *("loss/policy_avg", "loss/value_avg", "lr"),
    )

    learning_rate: float = 3e-6
    """Initial learning rate of AdamW."""

    logging_steps: float = 1
    """Log every so many rollouts; below 1, that share of all of them."""

    remove_unused_columns: bool | None = False
    """Drop all columns but the prompt; reward functions then cannot read them."""

    max_length: int | None = None
    """Has no effect: prompts are never cut, and completions have response_length."""

    num_mini_batches: int = 1
    """Updates that one pass over a rollout makes."""

    total_episodes: int | None = None
    """Completions to train on. None: num_train_epochs times the dataset."""

    local_rollout_forward_batch_size: int = 64
    """Completions that a process samples and scores at a time."""

    num_sample_generations: int = 10
    """How often completions are shown in the course of training."""

    response_length: int = 53
    """Tokens after which a completion is cut off."""

    stop_token: str | None = None
    """eos: completions end at the tokenizer's EOS token. None: see stop_token_id."""

    stop_token_id: int | None = None
    """Token at which completions end. None: all have response_length tokens."""

    temperature: float = 0.7
    """Divides the logits, in sampling and in the loss; higher: more varied completions."""

    missing_eos_penalty: float | None = None
    """Taken from the score of completions without an EOS token. None: nothing."""

    sft_model_path: str = "EleutherAI/pythia-160m"
    """Policy to start from, for the command line: a hub name or a folder."""

    reward_model_path: str = "EleutherAI/pythia-160m"
    """Reward model, from which the value model starts too, for the command line."""

    num_ppo_epochs: int = 4
    """Passes over each rollout."""

    reward_timeout: float | None = None
    """Seconds after which a reward function that has not answered is an error. None: no limit."""

    whiten_rewards: bool = False
    """Scale the rewards of a rollout to a variance of 1."""

    kl_coef: float = 0.05
    """Weight of the KL divergence from the reference in the rewards."""

    kl_estimator: str = one_of("trl_fast.losses.ppo:KL_ESTIMATORS", default="k1")
    """Estimator of the KL divergence: k1 (the log-ratio) or k3 (never negative, less variance)."""

    kl_target: float | None = None
    """Nats a completion that kl_coef is steered to (arXiv 1909.08593). None: kl_coef stays as it is."""

    kl_horizon: float = 10_000.0
    """Episodes in which kl_coef follows kl_target."""

    cliprange: float = 0.2
    """How far the probability ratio may leave 1 before it is clipped."""

    vf_coef: float = 0.1
    """Weight of the value loss."""

    cliprange_value: float = 0.2
    """How far values may move from those of the rollout in the value loss."""

    gamma: float = 1.0
    """Discount factor of later rewards."""

    lam: float = 0.95
    """Lambda of the generalized advantage estimation."""

    ds3_gather_for_generation: bool = True
    """With DeepSpeed ZeRO-3, gather the weights for generation: faster, but they must fit one GPU."""

    model_adapter_name: str | None = None
    """Name of the adapter to train. None: the active one."""

    ref_adapter_name: str | None = None
    """Name of the adapter that is the reference. None: the model without its adapter."""

    chat_template_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of the chat template, for conversational prompts. None: none."""

    log_completions: bool = False
    """Show and save completions with their scores, every logging_steps steps."""

    num_completions_to_print: int | None = None
    """Completions that are shown. None: all."""

    log_unique_prompts: bool = False
    """Show each prompt once."""

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
