"""Defines GOLDTrainer, with TRL's interface: distillation between models that may have different tokenizers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data.joined_text import tokenize_joined
from trl_fast.losses.mean_metric import Metric
from trl_fast.modeling.loading import base_model
from trl_fast.rollout import RolloutEngine
from trl_fast.rollout.samples import Samples

from ..base.trl_attributes import answers_to
from .cross_tokenizer import Interpreter, SpanUpdateMaker, check_tokenizers, distance_of
from .gkd import GKDTrainer
from .gold_config import GOLDConfig
from .gold_step import gold_step
from .teacher import head_sizes, tokenizer_of_teacher
from .trl_attributes import GOLD_ATTRIBUTES


@answers_to(GOLD_ATTRIBUTES)
class GOLDTrainer(GKDTrainer):
    """Trains by General On-Policy Logit Distillation, with TRL's arguments.

    Args: those of GKDTrainer; with `use_uld_loss` the teacher may have another tokenizer.

    Raises:
        ValueError, TypeError, NotImplementedError: as in GKDTrainer.
    """

    method = "gold"
    config_class: Any = GOLDConfig
    length_setting = "max_completion_length"
    tokenize_row = staticmethod(tokenize_joined)
    args: GOLDConfig
    # The teacher's, where it is another one than the student's.
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    spans: SpanUpdateMaker
    head_sizes: list[int]

    def compare_vocabularies(
        self, student: Any, teacher: Any, processing_class: PreTrainedTokenizerBase, args: Any
    ) -> None:
        """Finds out which tokens both models know; of two tokenizers, how they are held against each other.

        Raises:
            ValueError: the tokenizers cannot be compared as the arguments ask.
        """
        if not args.use_uld_loss:
            super().compare_vocabularies(student, teacher, processing_class, args)
            return
        self.vocab_size = None
        # As long as the heads are whole.
        self.head_sizes = head_sizes(student, teacher)
        self.teacher_tokenizer = tokenizer_of_teacher(teacher, args)
        check_tokenizers(processing_class, self.teacher_tokenizer, args)

    def probe_sequences(self, sequences: list[list[int]], student: Any, teacher: Any) -> list[list[int]]:
        """Returns prompts on which both models are tried out, of tokens that both have embeddings of.

        Raises:
            NotImplementedError: prompts have images, and the tokenizers differ.
        """
        if self.teacher_tokenizer is None:
            return sequences
        if self.images is not None:
            raise NotImplementedError(
                "use_uld_loss=True is not served for prompts with images; give a teacher with the student's tokenizer "
                "and set it to False"
            )
        known = min(self.head_sizes)
        return [[token % known for token in ids] for ids in sequences]

    def _set_up_rollouts(self, model: PreTrainedModel, layout: str, engine: RolloutEngine | None) -> None:
        super()._set_up_rollouts(model, layout, engine)
        args, other = self.args, self.teacher_tokenizer
        if other is None:
            return
        teacher: Any = base_model(self.accelerator.unwrap_model(self.teacher_model))
        positions = [
            getattr(one.config.get_text_config(), "max_position_embeddings", None) for one in (model, teacher)
        ]
        padding = other.eos_token_id if other.pad_token_id is None else other.pad_token_id
        sizes = self.head_sizes
        self.spans = SpanUpdateMaker(
            Interpreter(self.tokenizer, other, args, self.end_ids, (positions[0], positions[1])),
            self.updates,
            replace(self.updates, pad_token_id=padding or 0),
            distance_of(self.tokenizer, other, (sizes[0], sizes[1]), args, self.accelerator.device),
            args,
        )

    @property
    def shows_completions(self) -> bool:
        """Says whether this step's completions are shown, which log_completions_steps asks of some steps only."""
        return self.state.global_step % self.args.log_completions_steps == 0

    def _update(self, samples: Samples, tokens: float) -> Any:
        """Returns the micro-batch of samples, of both models' tokens where they have different ones."""
        if self.teacher_tokenizer is None:
            return super()._update(samples, tokens)
        of_step = self.args.per_device_train_batch_size * self.args.steps_per_generation
        # A row may be too long in the teacher's tokens, in one process only.
        with self.rescue.guard():
            return self.spans.update(samples, of_step if self.model.training else len(samples), tokens)

    def _compute_loss(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records it by who made its completions too."""
        given = (model, self.teacher_model, inputs, self.divergence_settings)
        result = gold_step(*given, **self.step_options)
        self.record(result.metrics)
        if self.model.training:
            steps = self.args.steps_per_generation
            of_student = self.mixture.drawn(self.state.global_step)[self.generation.step % steps]
            name = "on_policy_loss" if of_student else "off_policy_loss"
            self.record({name: Metric.over(result.loss.detach().float() * steps, 1)})
        return result.loss
