"""Defines IWOPDConfig, with TRL's arguments and defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from trl_fast.settings.choices import check_choice, one_of

from .config import check_prompt_room, check_sync_frequency, set_generation_batch_size
from .served_teacher import SAMPLED, URL_SETTING, ServedTeacherConfig

logger = logging.getLogger(__name__)

OBJECTIVES = ("iw_opd", "jsd")
IW_OPD, JSD = OBJECTIVES


@dataclass
class IWOPDConfig(ServedTeacherConfig):
    """Holds the arguments of IWOPDTrainer: a policy gradient on the student's tokens by what a teacher says of them.

    Set first: `output_dir`, `teacher_model_name_or_path`, or `use_teacher_server` and `teacher_model_server_url`;
    `learning_rate`, `max_completion_length`, `per_device_train_batch_size`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "iw_opd/mean_abs_advantage", "entropy", "completions/mean_length", "completions/clipped_ratio"),
        *("grad_norm", "learning_rate", "eval_loss"),
    )

    max_length: int | None = 1024
    """Longest prompt with its completion in tokens, from which max_prompt_length is made. None: no limit."""

    max_prompt_length: int | None = None
    """Longest prompt in tokens; longer ones lose their beginning. None: max_length less max_completion_length."""

    disable_dropout: bool = True
    """Switch dropout off in the model and the teacher."""

    top_p: float = 0.95
    """Sample from the likeliest tokens that have this probability together; 1: from all."""

    generation_batch_size: int | None = None
    """Different prompts of an optimizer step, a process's share. None: what num_generations leaves of its rows."""

    # The teacher.
    use_teacher_server: bool = False
    """Ask the vLLM server of teacher_model_server_url, instead of a teacher beside the student."""

    # What is learned.
    distillation_objective: str = one_of(OBJECTIVES, default="iw_opd")
    """Loss: iw_opd (a policy gradient on sampled tokens) or jsd (a divergence, as of DistillationTrainer)."""

    iw_opd_gamma: float = 0.5
    """How much more the first tokens of a completion weigh than the last; 0: all alike."""

    iw_opd_epsilon: float = 1e-8
    """The least sum of advantages that weights are divided by."""

    vllm_sync_frequency: int = 1
    """Only 1: completions are always sampled with the weights of their step."""

    log_completions_steps: int = 100
    """Steps between two tables of log_completions, of those steps that are logged."""

    @property
    def is_served(self) -> bool:
        """Says whether a server runs the teacher."""
        return self.use_teacher_server

    @property
    def given_prompt_limit(self) -> int | None:
        """Returns max_prompt_length: it holds for every prompt."""
        return self.max_prompt_length

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_teacher_server and self.teacher_model_server_url is None:
            raise ValueError(
                f"use_teacher_server=True: {URL_SETTING} is missing; set it to the vLLM server that runs the teacher"
            )
        if self.teacher_model_server_url is not None and not self.use_teacher_server:
            logger.warning(f"{URL_SETTING} has no effect without use_teacher_server=True.")
        check_sync_frequency(self)
        check_prompt_room(self)
        if self.max_length is not None and self.max_prompt_length is None:
            self.max_prompt_length = self.max_length - (self.max_completion_length or 0)
        set_generation_batch_size(self)

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and what is compared.

        Raises:
            ValueError: one is out of its range, or none of its choices, or does not go with another.
            NotImplementedError: what is compared is not served.
        """
        super().check_values()
        check_choice(self, "distillation_objective")
        if self.use_teacher_server:
            self.check_served()
        if self.distillation_objective == IW_OPD:
            self._check_policy_gradient()
            return
        self.check_something_is_learned()
        if 0 < self.beta < 1 and self.loss_top_k and not self.use_teacher_server:
            raise NotImplementedError(
                f"loss_top_k={self.loss_top_k} with beta={self.beta}: tokens of both models are not compared; set "
                "loss_top_k=0 to compare all, or beta to 0 or 1"
            )

    def _check_policy_gradient(self) -> None:
        objective = f"distillation_objective={IW_OPD!r}"
        if self.lmbda < 1:
            raise ValueError(
                f"lmbda={self.lmbda} with {objective}: a policy gradient is of completions that the student samples; "
                f"set lmbda=1, or distillation_objective={JSD!r}"
            )
        if self.reverse_kl_top_1_mode != SAMPLED:
            raise ValueError(
                f"reverse_kl_top_1_mode={self.reverse_kl_top_1_mode!r} with {objective}, which is of sampled tokens; "
                f"use {SAMPLED!r}"
            )
