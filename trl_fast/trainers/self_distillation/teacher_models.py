"""Makes the teacher of a model that teaches itself: the model as it is, as it was, or averaged over its steps.

A model without an adapter gets a frozen copy. With an adapter the teacher is the same model: without its adapter, with
a frozen copy of the one it came with, or, averaged, with a second adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.data import TokenBatch
from trl_fast.modeling.adapters import has_virtual_tokens
from trl_fast.modeling.distillation import TeacherStates, teacher_states
from trl_fast.modeling.reference_policy import adapter_twins, copy_adapter, reference_scope
from trl_fast.ops import TokenScores
from trl_fast.parallel.engines import Engine, engine_of
from trl_fast.parallel.partitions import leave_in_parts
from trl_fast.parallel.weights import local_shard

from ..base.callbacks import SyncRefModelCallback
from ..base.reference import ReferencePolicy
from .arguments import BASE, EMA, LIVE, SelfDistillationConfig

# TRL's name.
TEACHER_ADAPTER = "teacher"


class SelfTeacher(ReferencePolicy):
    """Holds the teacher of a trainer whose model teaches itself; `model` is None where it is the trainer's own."""

    _adapter: str | None = None  # of the trainer's model, as in `adapter_reference`
    _is_student = False  # the model as it is

    def set_up_teacher(
        self,
        policy: Any,
        args: SelfDistillationConfig,
        peft_config: PeftConfig | None,
        sequences: list[list[int]],
        *,
        wanted: bool = True,
    ) -> tuple[PreTrainedModel | PeftModel, str]:
        """Returns the student, adapted, and the batch layout; makes the teacher, if one is wanted.

        The other arguments are those of `set_up`.

        Raises:
            ValueError: the student's adapter is one that no teacher of this kind can be made of.
        """
        settings: Any = args  # it has what is read of a `ReferenceConfig`
        kind, came_with_adapter = args.teacher_model_kind, isinstance(policy, PeftModel)
        has_adapter = came_with_adapter or peft_config is not None
        self._is_student = kind == LIVE or not wanted
        copied = wanted and kind != LIVE and not has_adapter
        student, layout = self.set_up(
            *(policy, None, settings, peft_config, sequences), wanted=copied, adapter_wanted=wanted and kind == BASE
        )
        if isinstance(student, PeftModel) and wanted:
            _check_adapter(student, kind)
            if kind == EMA:
                self._add_adapter(student, zero=not came_with_adapter)
        return student, layout

    def _add_adapter(self, student: PeftModel, *, zero: bool) -> None:
        self._adapter = TEACHER_ADAPTER
        copy_adapter(student, student.active_adapter, TEACHER_ADAPTER)
        if zero:
            # As in TRL: the model without an adapter, which a new one does not change at first either. DoRA's lengths
            # of that model's weights stay.
            for name, weight in student.named_parameters():
                if f".{TEACHER_ADAPTER}." in f"{name}." and "magnitude" not in name:
                    weight.data.zero_()

    def start(self, callbacks: Iterable[Any]) -> None:
        """Puts the teacher where the student is, and lets an averaged one follow it."""
        super().start(callbacks)
        trainer = self._trainer
        if trainer.args.teacher_model_kind != EMA or self._is_student:
            return
        if self.model is None and engine_of(trainer.accelerator) is Engine.FSDP1:
            raise NotImplementedError(
                "teacher_model_kind='ema' with an adapter: FSDP1 holds both adapters' weights in one part; use FSDP2, "
                "or teacher_model_kind='base'"
            )
        trainer.add_callback(_FollowStudent(self))
        if self.model is not None:
            self._save()

    @torch.no_grad()
    def follow(self, student: torch.nn.Module, rate: float) -> None:
        """Moves each of the teacher's weights towards the student's by the share `rate`."""
        if self.model is not None:
            SyncRefModelCallback.sync_target_model(student, self.model, rate)
            return
        inner = self._trainer.accelerator.unwrap_model(student)
        # Small weights may be whole for the moment, which would not follow their parts.
        leave_in_parts(inner)
        for own, weight in adapter_twins(inner, inner.active_adapter, TEACHER_ADAPTER):
            local_shard(weight).lerp_(local_shard(own).to(weight.dtype), rate)

    @torch.no_grad()
    def states(self, batch: TokenBatch) -> TeacherStates:
        """Returns the teacher's states at a batch's N scored positions, without gradient."""
        with self._trainer.compute_loss_context_manager(), self._scope():
            found = teacher_states(self._called, batch)
        return found._replace(scope=self._scope) if self._switches else found

    @torch.no_grad()
    def score(self, batch: TokenBatch, **kwargs: Any) -> TokenScores:
        """Scores a batch's N tokens; `kwargs` are those of `modeling.scoring.score`."""
        with self._trainer.compute_loss_context_manager(), self._scope():
            return self._trainer.score(self._called, batch, **kwargs).tokens

    @property
    def _called(self) -> Any:
        """Returns the teacher as it is called."""
        return self._trainer.called_policy if self.model is None else self.model

    @property
    def _switches(self) -> bool:
        """Says whether the student has to change its adapter to be the teacher."""
        return self.model is None and not self._is_student

    def _scope(self) -> AbstractContextManager[None]:
        """Returns the context in which the student is the teacher, where it has to change its adapter for that."""
        trainer = self._trainer
        policy = trainer.accelerator.unwrap_model(trainer.model) if self._switches else None
        return reference_scope(policy, self._adapter)


class _FollowStudent(TrainerCallback):
    """Lets an averaged teacher follow the student, every args.teacher_sync_steps steps."""

    def __init__(self, teacher: SelfTeacher) -> None:
        self._teacher = teacher

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Updates the teacher when its time has come."""
        settings: Any = args
        if state.global_step % settings.teacher_sync_steps == 0:
            self._teacher.follow(kwargs["model"], settings.teacher_update_rate)


def _check_adapter(student: PeftModel, kind: str) -> None:
    """Checks that the student can be its own teacher with this adapter.

    Raises:
        ValueError: it puts tokens of its own before each row, or an average of it is not defined.
    """
    config = student.active_peft_config
    if has_virtual_tokens(student):
        raise ValueError(
            f"peft_config: {type(config).__name__} puts tokens of its own before each row, which a teacher without it "
            "has not; use LoRA"
        )
    if kind == EMA and TEACHER_ADAPTER in student.peft_config:
        raise ValueError(
            f"model: it has an adapter of the name {TEACHER_ADAPTER!r} already, which the averaged one gets; load it "
            "under another name, remove it by model.delete_adapter(...), or use teacher_model_kind='base' or 'live'"
        )
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    is_plain = config.peft_type == PeftType.LORA and getattr(config, "bias", "none") == "none"
    if kind == EMA and not (is_plain and all("lora_" in name for name in trained)):
        raise ValueError(
            "teacher_model_kind='ema' with an adapter averages LoRA's weights, and more than these train here; use "
            "LoRA without modules_to_save and bias, or teacher_model_kind='base' or 'live'"
        )
