"""Makes the prompts of SDPO's teacher, once the rewards of a generation are known, and says where it has none."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from accelerate.utils import gather_object

from trl_fast.data.teacher_prompts import PRIVILEGED_CONTEXT
from trl_fast.modeling.loading import base_model

from ..online.prompt_tokens import prompt_tokens
from .contexts import choose_contexts, context_metrics, is_feedback, teacher_prompt
from .diagnostics import Diagnostics
from .samples import TaughtSamples

logger = logging.getLogger(__name__)


class Reprompter:
    """Tells the teacher of a trainer's completions about other ones.

    Args:
        trainer: with SDPO's arguments.
        diagnostics: warns where the teacher is told nothing.
    """

    def __init__(self, trainer: Any, diagnostics: Diagnostics) -> None:
        self._trainer, self._diagnostics = trainer, diagnostics
        self._said: set[str] = set()

    def add_prompts(self, samples: TaughtSamples, rows: list[dict[str, Any]], rewards: torch.Tensor) -> None:
        """Adds the teacher's prompts to this process's samples, and records how many of them tell it something.

        Args:
            samples: this process's completions.
            rows: theirs, with the columns prompt and privileged_context.
            rewards: (N,) float32 of all processes' completions, NaN for none.
        """
        trainer = self._trainer
        args, group, rewards = trainer.args, trainer.group_size, rewards.cpu()
        feedbacks = [row.get(PRIVILEGED_CONTEXT) for row in rows]
        completions, feedbacks = self._of_all_processes(samples.completion_ids, feedbacks)
        contexts = choose_contexts(rewards, feedbacks, group, args)
        metrics = context_metrics(contexts, rewards, feedbacks, group, args.success_reward_threshold)
        trainer.recorder.record_values(metrics)
        self._diagnostics.warn_of_no_teacher(metrics, trainer.mode)
        self._say_ignored(feedbacks, any(PRIVILEGED_CONTEXT in row for row in rows))

        first = trainer.accelerator.process_index * len(rows)
        own = contexts[first : first + len(rows)]
        texts = self._texts(completions, {each.demonstration for each in own} - {None})
        samples.untaught = torch.tensor([not each.teaches for each in own])
        prompts = [
            teacher_prompt(row["prompt"], texts.get(each.demonstration), each.feedback, args)
            for row, each in zip(rows, own, strict=True)
            if each.teaches
        ]
        tokens = iter(self._tokens(prompts))
        pairs = zip(samples.prompt_ids, own, strict=True)
        samples.teacher_prompt_ids = [next(tokens) if each.teaches else ids for ids, each in pairs]

    def _of_all_processes(self, completions: list[list[int]], feedbacks: list) -> tuple[list[list[int]], list]:
        if self._trainer.accelerator.num_processes == 1:
            return completions, feedbacks
        found = gather_object(list(zip(completions, feedbacks, strict=True)))
        return [ids for ids, _ in found], [feedback for _, feedback in found]

    def _texts(self, completions: list[list[int]], numbers: set) -> dict[int | None, str]:
        """Returns the texts of the completions of these numbers."""
        tokenizer = self._trainer.tokenizer
        return {number: tokenizer.decode(completions[number], skip_special_tokens=True) for number in numbers}

    def _tokens(self, prompts: list) -> list[list[int]]:
        """Returns the tokens of prompts; completions of a group are often told the same."""
        args = self._trainer.args
        distinct: list = []
        for prompt in prompts:
            if prompt not in distinct:
                distinct.append(prompt)
        keywords = [args.chat_template_kwargs or {}] * len(distinct)
        found = self._cut(prompt_tokens(distinct, keywords, self._trainer.tokenizer))
        return [found[distinct.index(prompt)] for prompt in prompts]

    def _cut(self, prompts: list[list[int]]) -> list[list[int]]:
        """Returns the last tokens of prompts: as many as are asked for, and as the model has positions for."""
        args = self._trainer.args
        config = base_model(self._trainer.accelerator.unwrap_model(self._trainer.model)).config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
        longest = min(args.max_reprompt_len, positions - args.max_completion_length)
        if longest < args.max_reprompt_len and any(len(ids) > longest for ids in prompts):
            self._say_once(
                f"A prompt of the teacher is, with max_completion_length={args.max_completion_length}, longer than "
                f"the model's {positions} positions; it loses its beginning, as with max_reprompt_len={longest}."
            )
        return [ids[-longest:] for ids in prompts]

    def _say_ignored(self, feedbacks: list, has_column: bool) -> None:
        """Says that feedback is there and not shown, or that what is to be shown is not there."""
        if not self._trainer.args.include_environment_feedback:
            if any(map(is_feedback, feedbacks)):
                self._say_once(
                    f"The dataset's column {PRIVILEGED_CONTEXT!r} has texts, which the teacher is not shown; set "
                    "include_environment_feedback=True to show them."
                )
        elif not has_column:
            self._say_once(
                f"include_environment_feedback=True: the dataset has no column {PRIVILEGED_CONTEXT!r}, so that the "
                "teacher is shown no feedback; add one with a text in each row, or leave the argument out."
            )
        elif others := [each for each in feedbacks if each is not None and not isinstance(each, str)]:
            self._say_once(
                f"The dataset's column {PRIVILEGED_CONTEXT!r} has values that the teacher is not shown, such as a "
                f"{type(others[0]).__name__}; make texts of them."
            )

    def _say_once(self, message: str) -> None:
        if message not in self._said and self._trainer.accelerator.is_main_process:
            logger.warning(message)
        self._said.add(message)
