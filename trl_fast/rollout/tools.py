"""Calls the functions that a policy may use while it answers."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from .async_calls import run_together


@dataclass
class ToolResults:
    """Holds what the calls of one turn gave.

    - `messages`: by completion, one message of the role "tool" for each of its calls.
    - `calls`, `failures`: how many there were in all, and how many of them raised or could not be made.
    """

    messages: list[list[dict[str, Any]]]
    calls: int
    failures: int


class Toolbox:
    """Holds functions by name, with the schemas that tell a model about them.

    Args:
        tools: functions or methods, sync or async, with type hints and a docstring in Google's style that describes
            every argument.

    Attributes:
        schemas: a JSON schema each, for the chat template.

    Raises:
        TypeError: `tools` is no list, or one of them is no function.
        ValueError: one has no type hints or no docstring, or two have one name.
    """

    def __init__(self, tools: list[Callable[..., Any]]) -> None:
        if not isinstance(tools, list | tuple):
            raise TypeError(f"tools: expected a list of functions, got {tools!r} of type {type(tools).__name__}")
        self.functions: dict[str, Callable[..., Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        for tool in tools:
            schema = _schema(tool)
            name = schema["function"]["name"]
            if name in self.functions:
                raise ValueError(f"tools: two functions have the name {name!r}; expected a name of its own for each")
            self.functions[name] = tool
            self.schemas.append(schema)

    def run(self, turns: list[list[dict[str, Any]]]) -> ToolResults:
        """Makes the calls of several completions, given by completion.

        Sync functions run one after the other, in order; then all async ones, side by side. As in TRL, the results of
        a completion's sync calls come before those of its async ones. An error that a function raises is its result,
        for the model to read.
        """
        results: list[list[tuple[str, Any]]] = [[] for _ in turns]
        waiting: list[tuple[int, str, Awaitable[Any]]] = []
        for index, calls in enumerate(turns):
            for call in calls:
                name, result = self._call(call)
                if inspect.iscoroutine(result):
                    waiting.append((index, name, result))
                else:
                    results[index].append((name, result))
        answers = run_together(_caught(call) for _, _, call in waiting) if waiting else []
        for (index, name, _), answer in zip(waiting, answers, strict=True):
            results[index].append((name, answer))
        return ToolResults(
            messages=[[_message(*result) for result in of_one] for of_one in results],
            calls=sum(map(len, turns)),
            failures=sum(isinstance(result, Exception) for of_one in results for _, result in of_one),
        )

    def _call(self, call: dict[str, Any]) -> tuple[str, Any]:
        """Calls a function, and returns its name and its result, or the error."""
        kind = call.get("type")
        if kind != "function":
            return call.get("name", "unknown"), ValueError(f"Unsupported tool call type: {kind}")
        function = call.get("function", call)
        name = function["name"]
        if name not in self.functions:
            return name, ValueError(f"Tool {name} not found.")
        try:
            return name, self.functions[name](**function["arguments"])
        except Exception as error:
            return name, error


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
    if not (inspect.isroutine(tool) and hasattr(tool, "__name__")):
        raise TypeError(
            f"tools: expected functions with type hints and a docstring, got {tool!r} of type {type(tool).__name__}"
        )
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise ValueError(
            f"tools: {tool.__name__!r} cannot be described to the model: {error} Expected type hints, and a docstring "
            "that describes the function and, under 'Args:', each argument"
        ) from error


async def _caught(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except Exception as error:
        return error


def _message(name: str, result: Any) -> dict[str, Any]:
    """Returns the message that tells the model of a result: as text, but blocks of content stay what they are."""
    if isinstance(result, Exception):
        result = {"error": str(result)}
    blocks = isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result)
    return {"role": "tool", "name": name, "content": result if blocks else str(result)}
