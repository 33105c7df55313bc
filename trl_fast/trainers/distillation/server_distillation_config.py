"""Defines ServerDistillationConfig, with TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from .served_teacher import ServedTeacherConfig


@dataclass
class ServerDistillationConfig(ServedTeacherConfig):
    """Holds the arguments of ServerDistillationTrainer: distillation from a teacher that a vLLM server runs.

    Set first: `output_dir`, `teacher_model_server_url`, `learning_rate`, `max_completion_length`,
    `per_device_train_batch_size`; `beta` for the divergence, and `loss_top_k` where that is 0.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, and that a server can tell what is compared.

        Raises:
            ValueError: one is out of its range, or none of its choices, or does not go with another.
        """
        super().check_values()
        self.check_served()
        self.check_something_is_learned()
