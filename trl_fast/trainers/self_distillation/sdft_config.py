"""Defines SDFTConfig, with TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_fast.settings.choices import one_of

from .arguments import MODES, SelfDistillationConfig


@dataclass
class SDFTConfig(SelfDistillationConfig):
    """Holds the arguments of SDFTTrainer: a model learns to answer as it does when it is told more.

    Set first: `output_dir`, `learning_rate`, `max_completion_length`, `num_generations`,
    `per_device_train_batch_size`; `teacher_prompt_template` for how the teacher is told.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "sdft/distillation_loss", "completions/mean_length", "completions/clipped_ratio"),
        *("grad_norm", "learning_rate", "eval_loss"),
    )

    # What is learned.
    distillation_mode: str = one_of(MODES, default="topk_logits")
    """What is compared: sampled_token (the completion's own tokens), full_logits or topk_logits."""

    distillation_topk: int | None = 100
    """topk_logits: compare so many of the model's likeliest tokens."""

    num_loss_tokens_to_skip: int = 0
    """First tokens of a completion that are not learned, such as a phrase that only the teacher's prompt suggests."""

    # The prompts.
    generate_from_teacher: bool = False
    """Sample completions after the teacher's prompts instead of the student's."""

    teacher_prompt_template: str = "{prompt}\n\n{privileged_context}"
    """The teacher's prompt, or last message, made of the student's and of the column privileged_context."""

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and the template.

        Raises:
            ValueError: one is out of its range, or none of its choices, or does not go with another.
        """
        super().check_values()
        template = self.teacher_prompt_template
        try:
            told = template.format(prompt="\x00", privileged_context="\x01")
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"teacher_prompt_template={template!r} cannot be filled in ({error!r}); write other braces twice, as "
                "{{ and }}"
            ) from error
        if not {"\x00", "\x01"} <= set(told):
            raise ValueError(
                f"teacher_prompt_template={template!r} lacks a place; expected both {{prompt}} and "
                "{privileged_context}"
            )
