"""Asks reward sources about completions: functions, sync or async, and models, each answer checked."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_fast.modeling.loading import is_quantized

from .reward_answers import checked_rewards, copied, listed, shown
from .reward_model import RewardModel, load_classifier
from .reward_source import GivenReward, RewardSource
from .token_rewards import TokenRewardModel
from .user_calls import Outcome, TimeLimitError, UserCalls, described

logger = logging.getLogger(__name__)

MODELS = (RewardModel, TokenRewardModel)
# A column of one of these names is no further information about the prompt.
_NO_COLUMNS = ("prompt", "completion", "completion_ids")


class RewardFunctions:
    """Holds several reward sources, their names and weights. Calling it asks all of them about a batch.

    A function is called with keywords, each a list with one element a completion: `prompts`, `completions` and
    `completion_ids`, the dataset's columns, and with `trainer_state`, `log_extra` and `log_metric`; without `**kwargs`
    in its signature it gets those that it names. It returns a number for each completion, or None where it has none to
    give. Async functions run side by side in an event loop of their own thread. Each function gets copies of its
    arguments, so that none changes what another one sees, or what is logged.

    Args:
        reward_funcs: one or a list of: a function; a sequence classifier with one label, or its name or folder.
        reward_processing_classes: a tokenizer for each of them, None for a function and where the model's own is to be
            loaded. One that has no pad token gets its end token for that.
        weights: one for each of them; default 1.
        model_init_kwargs: for loading models by name.
        device: of the models, and of the rewards.
        max_length: tokens after which a text for a reward model is cut off; None keeps it whole.
        chat_template_kwargs: for the template that makes a conversation a reward model's text.
        timeout: seconds that a function may take for a batch; None is no limit.

    Attributes:
        names: a function's name, a partial's the name of what it wraps, an object's its class; a model's the last part
            of its path.
        weights: (R,) float32.

    Raises:
        ValueError: there is no reward function, lengths differ, or a model gives more than one number.
        TypeError: something cannot be called.
    """

    def __init__(
        self,
        reward_funcs: GivenReward | list[GivenReward] | None,
        *,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        weights: list[float] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        sources = as_list(reward_funcs)
        if not sources:
            raise ValueError("reward_funcs: there is no reward function; pass at least one function or reward model")
        tokenizers = as_list(reward_processing_classes) or [None] * len(sources)
        weights = [1.0] * len(sources) if weights is None else list(weights)
        for name, given in (("reward_processing_classes", tokenizers), ("reward_weights", weights)):
            if len(given) != len(sources):
                raise ValueError(f"{name}: expected one for each of {len(sources)} reward functions, got {len(given)}")
        self.device = torch.device(device)
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.functions: list[RewardSource] = []
        for source, tokenizer in zip(sources, tokenizers, strict=True):
            if isinstance(source, str | torch.nn.Module):
                model = load_classifier(source, model_init_kwargs, self.device)
                source = RewardModel(model, tokenizer, model_init_kwargs, max_length, chat_template_kwargs)
            elif not callable(source):
                raise TypeError(
                    f"reward_funcs: expected functions, models or names of models, got {type(source).__name__}"
                )
            self.functions.append(source)
        self.names = [_name(function) for function in self.functions]
        self.calls = UserCalls("reward function", "reward_timeout", timeout)

    def prepare_models(self, prepare: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """Has reward models prepared by the engine that shards the policy; quantised ones stay as they are.

        prepare: returns the model that is then asked.
        """
        for function in self.functions:
            if isinstance(function, MODELS) and not is_quantized(function.model):
                function.model = prepare(function.model)

    def check_conversations(self) -> None:
        """Raises ValueError if a reward model cannot read conversations."""
        for function in self.functions:
            if isinstance(function, RewardModel):
                function.check_conversations()

    def __len__(self) -> int:
        return len(self.functions)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        *,
        trainer_state: object | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> torch.Tensor:
        """Returns rewards (N, R) float32; NaN where a function returned None.

        Args:
            prompts, completions: texts or lists of messages.
            columns: further columns of the dataset, one value a completion.

        Raises:
            RuntimeError: a function raised, or exited; its own error is the cause.
            TimeLimitError: a function gave no answer within its time limit.
            ValueError: a function returned something else than N finite numbers or Nones, or needs an argument that
                there is not.
        """
        given: dict[str, Any] = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        given |= {"trainer_state": trainer_state, "log_extra": log_extra, "log_metric": log_metric}
        columns = {name: values for name, values in columns.items() if name not in _NO_COLUMNS}
        for name in columns.keys() & given.keys():
            raise ValueError(f"column {name!r} has the name of an argument of reward functions; rename the column")
        arguments = [_arguments(*named, given | columns) for named in zip(self.names, self.functions, strict=True)]
        answers = self._ask(arguments, len(prompts))
        rewards = [checked_rewards(name, answer, prompts) for name, answer in zip(self.names, answers, strict=True)]
        _warn_without_reward(rewards, prompts, completions)
        return torch.tensor(rewards, dtype=torch.float32, device=self.device).t().contiguous()

    def _ask(self, arguments: list[dict[str, Any]], count: int) -> list[Any]:
        """Returns what the functions answer: models first, then sync functions one by one, then async ones together.

        A model may be sharded over processes, which ask it together: none of them may have failed before.
        """
        answers: list[Any] = [None] * len(self.functions)
        for index in sorted(range(len(answers)), key=lambda index: not isinstance(self.functions[index], MODELS)):
            name, function = self.names[index], self.functions[index]
            own = {argument: copied(value) for argument, value in arguments[index].items()}
            outcome = self.calls.call(name, functools.partial(_listed_answer, function, count), **own)
            if outcome.error is not None:
                for answer in filter(inspect.iscoroutine, answers):
                    answer.close()
            answers[index] = _value(name, outcome)

        async def later(answer: Awaitable[Any]) -> Any:
            return listed(await answer, count)

        waiting = [index for index, answer in enumerate(answers) if inspect.isawaitable(answer)]
        outcomes = self.calls.gather([(self.names[index], later(answers[index])) for index in waiting])
        for index, outcome in zip(waiting, outcomes, strict=True):
            answers[index] = _value(self.names[index], outcome)
        return answers


class NoRewards(RewardFunctions):
    """Stands where a method learns without rewards: there are no sources."""

    def __init__(self) -> None:
        self.functions, self.names = [], []
        self.weights = torch.zeros(0)


def _listed_answer(function: RewardSource, count: int, /, **arguments: Any) -> Any:
    return listed(function(**arguments), count)


def as_list(value: Any) -> list:
    """Returns one or several values, None for no value, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _unwrapped(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Callable) -> str:
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def _arguments(name: str, function: Callable, available: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the available arguments that a function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # Some functions that are written in C do not tell.
        return available
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    optional = {p.name for p in parameters if p.default is not p.empty}
    missing = [name for name in taken if name not in available and name not in optional]
    if missing:
        raise ValueError(
            f"reward function {name!r} takes an argument {missing[0]!r}, which is no column of the dataset; there are "
            f"{sorted(available)}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return available
    return {name: available[name] for name in taken if name in available}


def _value(name: str, outcome: Outcome) -> Any:
    """Returns what a reward function gave.

    Raises:
        RuntimeError: it raised.
        TimeLimitError: it took too long.
    """
    error = outcome.error
    if isinstance(error, TimeLimitError):
        raise error
    if error is not None:
        raise RuntimeError(f"reward function {name!r} raised {described(error)}") from error
    return outcome.value


def _warn_without_reward(rewards: list[list[float]], prompts: list, completions: list) -> None:
    rows = [row for row, values in enumerate(zip(*rewards, strict=True)) if all(map(math.isnan, values))]
    if rows:
        logger.warning(
            f"All reward functions returned None for {len(rows)} of {len(prompts)} completions, which then teach "
            f"nothing. The first is completion {rows[0]}, {shown(completions[rows[0]])}, of the prompt "
            f"{shown(prompts[rows[0]])}"
        )
