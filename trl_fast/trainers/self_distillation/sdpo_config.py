"""Defines SDPOConfig: TRL's arguments and defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_fast.settings.choices import check_choice, one_of

from ..online.group_config import SCALES, RewardedGroupConfig, scale_name
from .arguments import MODES, TEACHER_KINDS, SelfDistillationConfig

if TYPE_CHECKING:
    from trl_fast.losses.policy_gradient import PolicyLossConfig

logger = logging.getLogger(__name__)

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
# The names that a template may use.
_TEMPLATES = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


@dataclass
class SDPOConfig(SelfDistillationConfig, RewardedGroupConfig):
    """Holds the arguments of SDPOTrainer: completions are rewarded, and a model that has seen a good one teaches.

    Set first: `output_dir`, `learning_rate`, `num_generations`, `max_completion_length`,
    `per_device_train_batch_size`; `success_reward_threshold`; `distillation_mode` and `teacher_model_kind`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
        NotImplementedError: use_teacher_server.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("self_distillation/distillation_loss", "self_distillation/reprompt_sample_fraction", "reward", "reward_std"),
        *("completions/mean_length", "completions/clipped_ratio", "loss", "grad_norm", "learning_rate"),
    )

    # What is learned.
    distillation_weight: float = 1.0
    """Weight of the teacher's loss, and one less this of the policy's: 1 learns from the teacher only, 0 as GRPO."""

    distillation_mode: str = one_of(MODES, default="sampled_token")
    """What is compared: sampled_token (the completion's own tokens), full_logits or topk_logits."""

    distillation_alpha: float = 1.0
    """Which divergence: 0 is forward KL, 1 reverse KL, between them lies the generalised Jensen-Shannon one."""

    teacher_model_kind: str = one_of(TEACHER_KINDS, default="ema")
    """Teacher: the model as it is (live), as it was at the beginning (base), or averaged over its steps (ema)."""

    # What the teacher is told.
    use_successful_as_teacher: bool = True
    """Show the teacher a successful completion of the same prompt."""

    success_reward_threshold: float = 1.0
    """Least reward of a successful completion."""

    dont_reprompt_on_self_success: bool = True
    """Show a completion's teacher another successful one only, never the completion itself."""

    include_environment_feedback: bool = False
    """Show the teacher the text in the dataset's column privileged_context."""

    environment_feedback_only_without_solution: bool = False
    """Show that text only where there is no successful completion."""

    remove_thinking_from_demonstration: bool = False
    """Leave <think>...</think> out of the completion that is shown."""

    max_reprompt_len: int = 10240
    """Longest prompt of the teacher in tokens; longer ones lose their beginning."""

    reprompt_template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    """The teacher's prompt, of {prompt}, {solution} and {feedback}; the latter two may be empty."""

    solution_template: str = "\nCorrect solution:\n\n{successful_previous_attempt}\n\n"
    """What {solution} is, of the completion {successful_previous_attempt}."""

    feedback_template: str = (
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n"
    )
    """What {feedback} is, of the text {feedback_raw}."""

    # The policy's loss.
    beta: float = 0.0
    """Has no effect, in TRL neither, and a line says so: the loss has no KL term."""

    loss_type: str = one_of(LOSS_TYPES, default="dapo")
    """What normalises the policy's loss: grpo, bnpo, dr_grpo or dapo, as in GRPOConfig."""

    importance_sampling_level: str = one_of(("token", "sequence"), default="token")
    """Probability ratio of each token (token) or one of a completion (sequence, GSPO)."""

    scale_rewards: str = one_of(SCALES, default="group")
    """Standard deviation that divides advantages: group (of a prompt's completions), batch or none."""

    # What is said of runs that learn nothing.
    diagnostics_warning_interval: int = 10
    """Warn again after so many generations in a row without differing rewards, or without a teacher; 0: never."""

    diagnostics_flat_tolerance: float = 1e-8
    """Standard deviation of rewards, or share of completions, up to which it counts as none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta != 0:
            logger.warning(f"beta={self.beta} has no effect: SDPO's loss has no KL term, in TRL neither.")
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo" and self.distillation_weight < 1:
            logger.warning(
                f"loss_type={self.loss_type!r} with importance_sampling_level='sequence': the loss sums over tokens, "
                "so a completion counts by its length; GSPO (arXiv 2507.18071) is loss_type='grpo'."
            )

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and the templates.

        Raises:
            ValueError: one is out of its range, or none of its choices, or a template uses another name.
        """
        self.scale_rewards = scale_name(self.scale_rewards)
        super().check_values()
        for name in ("loss_type", "importance_sampling_level", "scale_rewards"):
            check_choice(self, name)
        for name, known in _TEMPLATES.items():
            _check_template(name, getattr(self, name), known)

    def loss_config(self) -> PolicyLossConfig:
        """Returns the policy's loss."""
        from trl_fast.losses.policy_gradient import PolicyLossConfig

        names = ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high")
        return PolicyLossConfig.of(**{name: getattr(self, name) for name in names})


def _check_template(name: str, template: str, known: tuple[str, ...]) -> None:
    """Checks that a template can be filled in.

    Raises:
        ValueError: it uses other names, or has a brace that belongs to none.
    """
    try:
        template.format(**dict.fromkeys(known, ""))
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        places = " and ".join(f"{{{each}}}" for each in known)
        raise ValueError(
            f"{name}={template!r} cannot be filled in ({type(error).__name__}: {error}); it may use {places}, and "
            "other braces are written twice"
        ) from error
