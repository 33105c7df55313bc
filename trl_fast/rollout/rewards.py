"""Asks reward sources about completions: functions, sync or async, and models, each answer checked."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_fast.data.chat_template import apply_chat_template
from trl_fast.data.formats import is_conversational
from trl_fast.modeling.loading import is_quantized, load_reward_model

from .async_calls import run_together
from .reward_source import GivenReward, RewardSource

logger = logging.getLogger(__name__)

# A column of one of these names is no further information about the prompt.
_NO_COLUMNS = ("prompt", "completion", "completion_ids")
_SHOWN_CHARACTERS = 200


class RewardFunctions:
    """Holds several reward sources, their names and weights. Calling it asks all of them about a batch.

    A function is called with keywords, each a list with one element a completion: `prompts`, `completions` and
    `completion_ids`, the dataset's columns, and with `trainer_state`, `log_extra` and `log_metric`; without `**kwargs`
    in its signature it gets those that it names. It returns a number for each completion, or None where it has none to
    give. Async functions run side by side in an event loop of their own thread.

    Args:
        reward_funcs: one or a list of: a function; a sequence classifier with one label, or its name or folder.
        reward_processing_classes: a tokenizer for each of them, None for a function and where the model's own is to be
            loaded. One that has no pad token gets its end token for that.
        weights: one for each of them; default 1.
        model_init_kwargs: for loading models by name.
        device: of the models, and of the rewards.
        max_length: tokens after which a text for a reward model is cut off; None keeps it whole.
        chat_template_kwargs: for the template that makes a conversation a reward model's text.

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
    ) -> None:
        sources = _as_list(reward_funcs)
        if not sources:
            raise ValueError("reward_funcs: there is no reward function; pass at least one function or reward model")
        tokenizers = _as_list(reward_processing_classes) or [None] * len(sources)
        weights = [1.0] * len(sources) if weights is None else list(weights)
        for name, given in (("reward_processing_classes", tokenizers), ("reward_weights", weights)):
            if len(given) != len(sources):
                raise ValueError(f"{name}: expected one for each of {len(sources)} reward functions, got {len(given)}")
        self.device = torch.device(device)
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.functions: list[RewardSource] = []
        for source, tokenizer in zip(sources, tokenizers, strict=True):
            if isinstance(source, str | torch.nn.Module):
                model = _reward_model(source, model_init_kwargs, self.device)
                source = RewardModel(model, tokenizer, model_init_kwargs, max_length, chat_template_kwargs)
            elif not callable(source):
                raise TypeError(
                    f"reward_funcs: expected functions, models or names of models, got {type(source).__name__}"
                )
            self.functions.append(source)
        self.names = [_name(function) for function in self.functions]

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
            RuntimeError: a function raised; its own error is the cause.
            ValueError: a function returned something else than N finite numbers or Nones, or needs an argument that
                there is not.
        """
        given: dict[str, Any] = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        given |= {"trainer_state": trainer_state, "log_extra": log_extra, "log_metric": log_metric}
        columns = {name: values for name, values in columns.items() if name not in _NO_COLUMNS}
        for name in columns.keys() & given.keys():
            raise ValueError(f"column {name!r} has the name of an argument of reward functions; rename the column")
        arguments = [_arguments(*named, given | columns) for named in zip(self.names, self.functions, strict=True)]
        answers = self._ask(arguments)
        rewards = [_checked(name, answer, prompts) for name, answer in zip(self.names, answers, strict=True)]
        _warn_without_reward(rewards, prompts, completions)
        return torch.tensor(rewards, dtype=torch.float32, device=self.device).t().contiguous()

    def _ask(self, arguments: list[dict[str, Any]]) -> list[Any]:
        """Returns what the functions answer: the sync ones one after the other, then the async ones together."""
        answers: list[Any] = [None] * len(self)
        waiting = []
        for index, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            if _is_async(function):
                waiting.append(index)
            else:
                with _naming(name):
                    answers[index] = function(**arguments[index])

        async def ask(index: int) -> Any:
            with _naming(self.names[index]):
                function: Any = self.functions[index]
                return await function(**arguments[index])

        if waiting:
            for index, answer in zip(waiting, run_together(map(ask, waiting)), strict=True):
                answers[index] = answer
        return answers


class RewardModel:
    """Asks a sequence classifier with one label about prompt and completion as one text: a reward source.

    Args:
        model: on its device; it is put into eval mode.
        tokenizer: None loads the model's own.
        model_init_kwargs: `revision` and `trust_remote_code` of them are for loading the tokenizer.
        max_length, chat_template_kwargs: as in `RewardFunctions`.

    Raises:
        ValueError: the model has more than one label.
        TypeError: it is a module without a config.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        max_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not hasattr(model, "config"):
            raise TypeError(
                f"reward_funcs: {type(model).__name__} is no model of transformers; pass a function instead"
            )
        config: Any = model.config
        path = config._name_or_path
        self.__name__ = path.rstrip("/").split("/")[-1] or type(model).__name__
        if config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__!r} has num_labels={config.num_labels}, but a reward is one number"
            )
        if tokenizer is None:
            known = {key: value for key, value in (model_init_kwargs or {}).items() if key in _TOKENIZER_KEYWORDS}
            tokenizer = AutoTokenizer.from_pretrained(path, **known)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model looks for the last token that is none of these.
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat_template_kwargs = chat_template_kwargs or {}

    def __call__(self, prompts: list, completions: list) -> list[float]:
        """Returns a reward for each completion.

        Raises:
            ValueError: a text has more tokens than the model has positions.
        """
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if is_conversational({"prompt": prompts[0]}):
            keywords = self.chat_template_kwargs
            texts = [apply_chat_template({"messages": text}, self.tokenizer, **keywords)["text"] for text in texts]
        inputs = self.tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=False,
        )
        longest = inputs["input_ids"].shape[1]
        positions = getattr(cast("Any", self.model.config).get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(f"a prompt and its completion have {longest} tokens, the model has {positions} positions")
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(**inputs.to(device)).logits[:, 0].tolist()


_TOKENIZER_KEYWORDS = ("revision", "trust_remote_code")


def _reward_model(source: str | torch.nn.Module, init_kwargs: dict | None, device: torch.device) -> torch.nn.Module:
    model: Any = source
    if isinstance(source, str):
        # The checkpoint's own dtype, and all of it on one device unless something else is asked for.
        model = load_reward_model(source, **{"dtype": "auto", "device_map": None, **(init_kwargs or {})})
    spread = getattr(model, "hf_device_map", None) is not None
    return model if spread or is_quantized(model) else model.to(device)


def _as_list(value: Any) -> list:
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


def _is_async(function: Callable) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


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


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of an error which reward function raised it."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error


def _checked(name: str, answer: Any, prompts: list) -> list[float]:
    """Returns a function's answer as floats, NaN for None."""
    who = f"reward function {name!r}"
    if isinstance(answer, str | bytes | dict) or not isinstance(answer, Iterable):
        if inspect.iscoroutine(answer):
            answer.close()
        raise ValueError(f"{who} returned a {type(answer).__name__}; expected a list with one reward a completion")
    values = list(answer)
    if len(values) != len(prompts):
        raise ValueError(f"{who} returned {len(values)} rewards for {len(prompts)} completions")
    return [_as_float(value, f"{who}, completion {i}", prompts[i]) for i, value in enumerate(values)]


def _as_float(value: Any, where: str, prompt: Any) -> float:
    if value is None:
        return math.nan
    # Scalars of torch and numpy.
    number = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(number, Real):
        raise ValueError(
            f"{where}: expected a number or None, got {value!r} of type {type(value).__name__} (prompt: "
            f"{_shown(prompt)})"
        )
    magnitude: Any = abs(number)
    if not magnitude <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"{where}: expected a finite number, or None for no reward, got {number!r} (prompt: {_shown(prompt)})"
        )
    return float(number)


def _warn_without_reward(rewards: list[list[float]], prompts: list, completions: list) -> None:
    rows = [row for row, values in enumerate(zip(*rewards, strict=True)) if all(map(math.isnan, values))]
    if rows:
        logger.warning(
            f"All reward functions returned None for {len(rows)} of {len(prompts)} completions, which then teach "
            f"nothing. The first is completion {rows[0]}, {_shown(completions[rows[0]])}, of the prompt "
            f"{_shown(prompts[rows[0]])}"
        )


def _shown(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
