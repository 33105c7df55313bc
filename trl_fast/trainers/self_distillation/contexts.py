"""Chooses what SDPO's teacher is told about each completion's prompt: a successful completion, feedback, or nothing.

The teacher is told of the first completion of the same prompt whose reward reaches a threshold, and of a text that
came with the dataset's row. A completion without either has no teacher.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trl_fast.data.teacher_prompts import last_user_text, with_last_user_text

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class ContextSettings(Protocol):
    """Names the arguments that say what a teacher is told; `SDPOConfig` has them."""

    use_successful_as_teacher: bool
    success_reward_threshold: float
    dont_reprompt_on_self_success: bool
    include_environment_feedback: bool
    environment_feedback_only_without_solution: bool
    remove_thinking_from_demonstration: bool
    reprompt_template: str
    solution_template: str
    feedback_template: str


@dataclass(frozen=True)
class Context:
    """Holds what the teacher of a completion is told: `demonstration`, a completion's number, and `feedback`."""

    demonstration: int | None = None
    feedback: str | None = None

    @property
    def teaches(self) -> bool:
        """Says whether there is a teacher: one that is told nothing has nothing to teach."""
        return self.demonstration is not None or self.feedback is not None


def is_feedback(value: Any) -> bool:
    """Says whether a value of the column privileged_context says something."""
    return isinstance(value, str) and bool(value.strip())


def choose_contexts(
    rewards: torch.Tensor, feedbacks: Sequence[Any], group: int, settings: ContextSettings
) -> list[Context]:
    """Returns what the teacher of each of N completions is told.

    Args:
        rewards: (N,) float32, NaN for none.
        feedbacks: N values of the column privileged_context.
        group: consecutive completions of one prompt.
        settings: the arguments.
    """
    succeeded = (rewards >= settings.success_reward_threshold).tolist()
    contexts = []
    for index, feedback in enumerate(feedbacks):
        first = index - index % group
        others = (
            each
            for each in range(first, first + group)
            if succeeded[each] and not (settings.dont_reprompt_on_self_success and each == index)
        )
        demonstration = next(others, None) if settings.use_successful_as_teacher else None
        told = settings.include_environment_feedback and is_feedback(feedback)
        if demonstration is not None and settings.environment_feedback_only_without_solution:
            told = False
        contexts.append(Context(demonstration, feedback if told else None))
    return contexts


def context_metrics(
    contexts: Sequence[Context], rewards: torch.Tensor, feedbacks: Sequence[Any], group: int, threshold: float
) -> dict[str, float]:
    """Computes the shares of N completions that have a teacher, and of what it is told.

    rewards: (N,) float32; the others are as above.
    """
    count = len(contexts)
    has_success = (rewards >= threshold).view(-1, group).any(dim=1)
    shares = {
        "success_group_fraction": has_success.float().mean().item(),
        "success_sample_fraction": sum(each.demonstration is not None for each in contexts) / count,
        "feedback_available_fraction": sum(map(is_feedback, feedbacks)) / count,
        "feedback_used_fraction": sum(each.feedback is not None for each in contexts) / count,
        "reprompt_sample_fraction": sum(each.teaches for each in contexts) / count,
    }
    return {f"self_distillation/{name}": value for name, value in shares.items()}


def teacher_prompt(prompt: Any, demonstration: str | None, feedback: str | None, settings: ContextSettings) -> Any:
    """Returns the prompt of a teacher, a text or a conversation as the student's is.

    demonstration, feedback: the texts that it is told; None: there is none.

    Raises:
        ValueError: a conversation does not end with a user's message.
    """
    solution = told = ""
    if demonstration is not None:
        if settings.remove_thinking_from_demonstration:
            demonstration = _THINKING.sub("", demonstration).strip()
        solution = settings.solution_template.format(successful_previous_attempt=demonstration)
    if feedback is not None:
        told = settings.feedback_template.format(feedback_raw=feedback)

    def filled(text: str) -> str:
        return settings.reprompt_template.format(prompt=text, solution=solution, feedback=told)

    return with_last_user_text(prompt, filled(last_user_text(prompt)))
