"""Calls the functions that a policy may use while it answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from .reward_answers import copied
from .tool_arguments import checked_arguments
from .user_calls import LastingThread, Outcome, TimeLimitError, UserCalls, described, side_by_side


@dataclass
class ToolResults:
    """Holds what the calls of one turn gave.

    - `messages`: by completion, one message of the role "tool" for each of its calls.
    - `calls`, `failures`: how many there were in all, and how many of them raised, took too long or could not be made.
    """

    messages: list[list[dict[str, Any]]]
    calls: int
    failures: int


class Toolbox:
    """Holds functions by name, with the schemas that tell a model about them.

    Args:
        tools: functions or methods, sync or async, with type hints and a docstring in Google's style that describes
            every argument.
        timeout: seconds that a call may take; None is no limit.

    Attributes:
        functions: by name.
        threads: where functions are called that have to be in a thread of their own, by name.
        lost: what made the functions useless, such as a failure of the environment that they belong to; None: nothing.

    Raises:
        TypeError: `tools` is no list, or one of them is no function.
        ValueError: one has no type hints or no docstring, or two have one name.
    """

    def __init__(self, tools: list[Callable[..., Any]], timeout: float | None = None) -> None:
        if not isinstance(tools, list | tuple):
            raise TypeError(f"tools: expected a list of functions, got {tools!r} of type {type(tools).__name__}")
        self.functions: dict[str, Callable[..., Any]] = {}
        self._schemas: dict[str, dict[str, Any]] = {}
        self.calls = UserCalls("tool", "tool_timeout", timeout)
        self.threads: Mapping[str, LastingThread] = {}
        self.lost: BaseException | None = None
        self._has_state = False
        for tool in tools:
            schema = _schema(tool)
            name = schema["function"]["name"]
            if name in self.functions:
                raise ValueError(f"tools: two functions have the name {name!r}; expected a name of its own for each")
            self.functions[name] = tool
            self._schemas[name] = schema

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Returns a JSON schema for each function, for the chat template."""
        return list(self._schemas.values())

    def bound(self, functions: dict[str, Callable[..., Any]]) -> Toolbox:
        """Returns a toolbox of the same names and schemas with other functions, which share a state.

        What takes too long goes on behind the state's back, so the toolbox is lost then.
        """
        box = copy.copy(self)
        box.functions, box.lost, box._has_state = functions, None, True
        return box

    def run(self, turns: list[list[dict[str, Any]]]) -> ToolResults:
        """Makes the calls of several completions, given by completion; see `run_tools`."""
        return run_tools([self] * len(turns), turns)

    def call(self, call: dict[str, Any]) -> tuple[str, Outcome]:
        """Calls a function, and returns its name and how it went; of an async one the value is what to await."""
        kind = call.get("type")
        if kind != "function":
            return call.get("name", "unknown"), Outcome(error=ValueError(f"Unsupported tool call type: {kind}"))
        function = call.get("function", call)
        name = function["name"]
        if name not in self.functions:
            return name, Outcome(error=ValueError(f"Tool {name} not found."))
        tool = self.functions[name]
        try:
            arguments = checked_arguments(tool, self._schemas[name], function["arguments"])
        except ValueError as error:
            return name, Outcome(error=error)
        # The call is part of the completion, which a tool is not to change.
        given = {"tool": tool, "arguments": copied(arguments)}
        return name, self.calls.call(name, _content, self.threads.get(name), **given)

    def see(self, outcome: Outcome) -> None:
        """Takes note of how a call went."""
        if self._has_state and isinstance(outcome.error, TimeLimitError):
            self.lost = self.lost or outcome.error


def run_tools(boxes: Sequence[Toolbox], turns: list[list[dict[str, Any]]], workers: int = 1) -> ToolResults:
    """Makes the calls of several completions, given by completion, each with a toolbox.

    Sync functions run one after the other, in order; then all async ones, side by side. As in TRL, the results of a
    completion's sync calls come before those of its async ones. An error that a function raises is its result, for the
    model to read, and so is one of its arguments, with which it is not called.

    workers: completions whose sync functions run at a time, in threads if there are several.
    """
    results: list[list[tuple[dict[str, Any], str, Outcome]]] = [[] for _ in turns]
    waiting: list[tuple[int, dict[str, Any], str, Awaitable[Any]]] = []
    jobs = [partial(_called_in_turn, box, calls) for box, calls in zip(boxes, turns, strict=True)]
    for index, found in enumerate(side_by_side(jobs, workers)):
        for call, name, outcome in found:
            if inspect.isawaitable(outcome.value):
                waiting.append((index, call, name, outcome.value))
            else:
                results[index].append((call, name, outcome))
    if waiting:
        answers = boxes[0].calls.gather([(name, _content_later(value)) for _, _, name, value in waiting])
        for (index, call, name, _), answer in zip(waiting, answers, strict=True):
            results[index].append((call, name, answer))
    for box, of_one in zip(boxes, results, strict=True):
        for *_, outcome in of_one:
            box.see(outcome)
    return ToolResults(
        messages=[[_message(*result) for result in of_one] for of_one in results],
        calls=sum(map(len, turns)),
        failures=sum(outcome.error is not None for of_one in results for *_, outcome in of_one),
    )


def _called_in_turn(box: Toolbox, calls: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, Outcome]]:
    return [(call, *box.call(call)) for call in calls]


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
    if not (inspect.isroutine(tool) and hasattr(tool, "__name__")):
        raise TypeError(
            f"tools: expected functions with type hints and a docstring, got {tool!r} of type {type(tool).__name__}"
        )
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        why = str(error).rstrip()
        why += "" if why.endswith((".", "!", "?")) else "."
        raise ValueError(
            f"tools: {tool.__name__!r} cannot be described to the model: {why} Expected type hints, and a docstring "
            "that describes the function and, under 'Args:', each argument"
        ) from error


def _content(tool: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Returns the content of a message with a tool's result; of an async tool its coroutine."""
    result = tool(**arguments)
    return result if inspect.isawaitable(result) else _as_content(result)


async def _content_later(call: Awaitable[Any]) -> Any:
    return _as_content(await call)


def _as_content(result: Any) -> Any:
    """Returns a result as text, but blocks of content as they are, in a list that the tool does not hold."""
    blocks = isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result)
    # Text that no tokenizer takes, halves of characters, comes from tools that read files or pages.
    return copied(result) if blocks else str(result).encode("utf-8", "replace").decode("utf-8")


def _message(call: dict[str, Any], name: str, outcome: Outcome) -> dict[str, Any]:
    """Returns the message that tells the model of a result, or of an error, with the call's id if it has one."""
    error, content = outcome.error, outcome.value
    if error is not None:
        text = described(error)
        # An exit's own text is often a bare number; of others TRL tells the text.
        content = str({"error": text.partition(": ")[2] if isinstance(error, Exception) else text})
    numbered = {"tool_call_id": call["id"]} if call.get("id") else {}
    return {"role": "tool", "name": name, **numbered, "content": content}
