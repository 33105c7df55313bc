"""Computes rewards for online methods, with TRL's names, arguments and results.

A reward function gets lists with one element a completion and returns one reward each, None where there is none.
Completions are conversational: a list of one message. Those with settings are objects, so that they can be pickled.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

Completions = list[list[dict[str, str]]]

# Seconds after which a formula that does not come to an end counts as wrong.
_PARSING_TIMEOUT, _VERIFYING_TIMEOUT = 10, 5
_THOUGHT_THEN_ANSWER = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)


def accuracy_reward(
    completions: Completions,
    solution: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Returns 1 where the completion's answer equals the solution as mathematics, else 0.

    None stands for a solution that is no formula. The answer is LaTeX that is in `\boxed{...}` or announced as the
    answer; what is in a box comes first.
    log_extra: gets the columns solution, gold_parsed and answer_parsed for the table of completions.

    Raises:
        ImportError: math_verify is not installed.
        ValueError: there are not as many solutions as completions.
    """
    return _accuracy(_texts(completions), solution, log_extra)


def reasoning_accuracy_reward(
    completions: Completions,
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Computes `accuracy_reward` of what follows the reasoning; 0 if the reasoning does not come to an end.

    reasoning_delimiters: the texts that may end it; of the first one that occurs, the last occurrence counts. Default:
    ["</think>"].

    Raises:
        ImportError: math_verify is not installed.
        ValueError: there are not as many solutions as completions.
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    texts = _texts(completions)
    return _accuracy([_after_reasoning(text, delimiters) for text in texts], solution, log_extra)


def _texts(completions: Completions) -> list[str]:
    """Returns the text of each completion's first message.

    Raises:
        TypeError: completions are texts, as those of plain prompts are.
    """
    if any(isinstance(completion, str) for completion in completions):
        raise TypeError(
            "completions: expected lists with one message, got texts; give prompts as conversations, "
            "[{'role': 'user', 'content': ...}]"
        )
    return [completion[0]["content"] for completion in completions]


class _Incomplete:
    """Stands for an answer that never came."""


def _after_reasoning(text: str, delimiters: list[str]) -> str | type[_Incomplete]:
    for delimiter in delimiters:
        if delimiter in text:
            return text.rpartition(delimiter)[2]
    return _Incomplete


def _accuracy(
    answers: list[Any], solutions: list[str], log_extra: Callable[[str, list], None] | None
) -> list[float | None]:
    """Returns the rewards of answers, texts or `_Incomplete`."""
    math_verify = _import_math_verify()
    if len(answers) != len(solutions):
        raise ValueError(f"solution: expected one for each of {len(answers)} completions, got {len(solutions)}")
    judged = [_judge(math_verify, *pair) for pair in zip(answers, solutions, strict=True)]
    if log_extra is not None:
        log_extra("solution", list(solutions))
        log_extra("gold_parsed", [gold for _, gold, _ in judged])
        log_extra("answer_parsed", [answer for _, _, answer in judged])
    return [reward for reward, _, _ in judged]


def _judge(math_verify: ModuleType, answer: Any, solution: str) -> tuple[float | None, str, str]:
    """Returns the reward, and how solution and answer were understood."""
    if answer is _Incomplete:
        return 0.0, "[incomplete reasoning]", "[incomplete reasoning]"
    # math_verify's timeouts are alarm signals, which only the main thread gets.
    in_main_thread = threading.current_thread() is threading.main_thread()
    limit = _PARSING_TIMEOUT if in_main_thread else None
    gold = math_verify.parse(solution, parsing_timeout=limit)
    if not gold:
        return None, "[unparseable]", "[skipped]"
    parsed = math_verify.parse(
        answer, extraction_config=[_latex(math_verify)], extraction_mode="first_match", parsing_timeout=limit
    )
    right = math_verify.verify(gold, parsed, timeout_seconds=_VERIFYING_TIMEOUT if in_main_thread else None)
    return float(right), str(gold), str(parsed) if parsed else "[unparseable]"


def _latex(math_verify: ModuleType) -> Any:
    from latex2sympy2_extended import NormalizationConfig

    return math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )


def _import_math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("accuracy rewards need math-verify: `pip install 'trl-fast[math]'`") from error
    if threading.current_thread() is not threading.main_thread():
        # They warn at every call that there is no timeout.
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return math_verify


def think_format_reward(completions: Completions, **kwargs: Any) -> list[float]:
    """Returns 1 where the completion begins with one thought in <think> and </think>, else 0."""
    return [float(bool(_THOUGHT_THEN_ANSWER.match(text))) for text in _texts(completions)]


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Returns a reward: accuracy scaled by length along a cosine. arXiv 2502.03373, Appendix C.1.

    A right completion gets max_value_correct at length 0 and min_value_correct from max_len tokens on; a wrong one
    min_value_wrong at length 0 and max_value_wrong from max_len on.

    Raises:
        ValueError: max_len is not positive.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be a positive number of tokens, got {max_len}")
    right, wrong = (max_value_correct, min_value_correct), (min_value_wrong, max_value_wrong)
    return _CosineScaledReward(max_len, right, wrong)


@dataclass
class _CosineScaledReward:
    max_len: int
    # Reward at length 0 and at max_len.
    right: tuple[float, float]
    wrong: tuple[float, float]
    __name__ = "cosine_scaled_reward"

    def __call__(
        self, completions: Completions, solution: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        accuracies = accuracy_reward(completions, solution)
        return [self._scale(accuracy, len(ids)) for accuracy, ids in zip(accuracies, completion_ids, strict=True)]

    def _scale(self, accuracy: float | None, length: int) -> float | None:
        if accuracy is None:
            return None
        start, end = self.right if accuracy else self.wrong
        # The cosine would climb again beyond max_len.
        return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(length / self.max_len, 1.0)))


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """Returns a reward: max_penalty times the share of a completion's n-grams of tokens that repeat others.

    arXiv 2502.03373, Appendix C.2.

    Raises:
        ValueError: max_penalty is positive, or ngram_size is not.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty should not be positive, got {max_penalty}")
    if ngram_size < 1:
        raise ValueError(f"ngram_size must be positive, got {ngram_size}")
    return _RepetitionPenalty(ngram_size, max_penalty)


@dataclass
class _RepetitionPenalty:
    ngram_size: int
    max_penalty: float
    __name__ = "repetition_penalty_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: list[int]) -> float:
        ngrams = [tuple(ids[start : start + self.ngram_size]) for start in range(len(ids) - self.ngram_size + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0
        return repeated * self.max_penalty if repeated else 0.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """Returns a reward: 0, falling to -1 in the last `soft_punish_cache` tokens before `max_completion_len`.

    Longer completions get -1. DAPO, arXiv 2503.14476, Eq. 13.
    """
    return _SoftOverlongPunishment(max_completion_len, soft_punish_cache)


@dataclass
class _SoftOverlongPunishment:
    max_completion_len: int
    soft_punish_cache: int
    __name__ = "soft_overlong_punishment_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, length: int) -> float:
        free = self.max_completion_len - self.soft_punish_cache
        if length <= free:
            return 0.0
        return (free - length) / self.soft_punish_cache if length <= self.max_completion_len else -1.0
