"""Defines what the configs of SDFT and SDPO share: the teacher, which is the model itself, and what is compared."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from trl_fast.settings.choices import check_choice, one_of

from ..online.group_config import GroupConfig
from ..online.sampling_config import check_rows_are_whole

logger = logging.getLogger(__name__)

# The student as it is, as it was at the beginning, and averaged over its steps.
TEACHER_KINDS = ("live", "base", "ema")
LIVE, BASE, EMA = TEACHER_KINDS
MODES = ("sampled_token", "full_logits", "topk_logits")
SAMPLED_TOKEN, FULL_LOGITS, TOPK_LOGITS = MODES


@dataclass
class SelfDistillationConfig(GroupConfig):
    """Holds the arguments of a method whose teacher is the model itself, after a prompt that tells more.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    # The teacher is none of the references that other methods have: what a `ReferencePolicy` asks of those.
    sync_ref_model: ClassVar[bool] = False
    model_adapter_name: ClassVar[str | None] = None
    ref_adapter_name: ClassVar[str | None] = None

    learning_rate: float = 5e-5
    """Initial learning rate of AdamW."""

    disable_dropout: bool = True
    """Switch dropout off in the model and the teacher."""

    max_prompt_length: int | None = 512
    """Longest prompt in tokens; longer ones lose their beginning. None: no limit."""

    max_completion_length: int | None = 256
    """Tokens after which a completion is cut off."""

    # The teacher.
    teacher_model_kind: str = one_of(TEACHER_KINDS, default="base")
    """Teacher: the model as it is (live), as it was at the beginning (base), or averaged over its steps (ema)."""

    teacher_update_rate: float = 0.05
    """ema: the model's share when the teacher follows it: teacher = rate * model + (1 - rate) * teacher."""

    teacher_sync_steps: int = 1
    """ema: update steps between two times that the teacher follows."""

    use_teacher_server: bool = False
    """Ask a vLLM server for the teacher's log-probabilities; not served: the teacher is computed beside the model."""

    # What is learned.
    distillation_mode: str = one_of(MODES, default="full_logits")
    """What is compared: sampled_token (the completion's own tokens), full_logits or topk_logits."""

    distillation_alpha: float = 0.5
    """Which divergence: 0 is forward KL, 1 reverse KL, between them lies the generalised Jensen-Shannon one."""

    distillation_topk: int | None = None
    """topk_logits: compare so many of the model's likeliest tokens. None: there is no such number for other modes."""

    distillation_add_tail: bool = False
    """topk_logits: compare all other tokens too, as one. False: the distributions among the likeliest."""

    distillation_is_clip: float | None = 2.0
    """Upper bound of the ratio that corrects for a policy that has moved since it sampled. None: no correction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows_are_whole(self)
        if self.use_teacher_server:
            raise NotImplementedError(
                "use_teacher_server=True: trl_fast computes the teacher beside the model, on shared prompts; set it "
                "to False"
            )
        self.check_values()
        if self.distillation_add_tail and self.distillation_mode != TOPK_LOGITS:
            logger.warning(
                f"distillation_add_tail=True has no effect with distillation_mode={self.distillation_mode!r}, which "
                "leaves no tokens out."
            )

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and what is compared.

        Raises:
            ValueError: one is out of its range, or none of its choices, or does not go with another.
        """
        super().check_values()
        check_choice(self, "teacher_model_kind")
        check_choice(self, "distillation_mode")
        if self.distillation_mode == SAMPLED_TOKEN and self.distillation_alpha != 1:
            raise ValueError(
                f"distillation_alpha={self.distillation_alpha} with distillation_mode={SAMPLED_TOKEN!r}: of one token "
                "only the reverse KL is estimated; set distillation_alpha=1.0, or another mode"
            )
        if self.distillation_mode == TOPK_LOGITS and self.distillation_topk is None:
            raise ValueError(
                f"distillation_topk is missing, which distillation_mode={TOPK_LOGITS!r} needs; set it to a "
                "number of tokens, or use 'full_logits'"
            )
