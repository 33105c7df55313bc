"""Says what a chat template does with tool calls, and gives tokenizers what reads them, under TRL's names.

A processor of images may be given in the place of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_fast.data.text_side import text_side

from .responses import find_response_template, find_thought_template, parse_message

ProcessingClassT = TypeVar("ProcessingClassT", PreTrainedTokenizerBase, ProcessorMixin)


def supports_tool_calling(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    """Says whether the chat template writes tool calls, with name and arguments, and their results."""
    try:
        find_response_template(text_side(processing_class))
    except ValueError as error:
        return _writes_calls(error)
    return True


def _writes_calls(error: ValueError) -> bool:
    """Says whether it is only the parser that does not know the format of a template's calls."""
    return "in a format that is not known" in str(error)


def is_chat_template_prefix_preserving(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    """Says whether the chat template writes a tool call in the same way whether its result follows or not."""
    reader = text_side(processing_class)

    def tokens(messages: list[dict[str, Any]], **how: Any) -> list[int]:
        return reader.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"]

    def is_preserved(arguments: dict[str, Any] | str) -> bool:
        call = {"type": "function", "function": {"name": "dummy", "arguments": arguments}}
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": "dummy"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        before = tokens(asked)
        answered = [*asked, {"role": "tool", "name": "dummy", "content": "dummy"}]
        return tokens(answered, add_generation_prompt=True)[: len(before)] == before

    try:
        return is_preserved({})
    except TypeError:
        # DeepSeek-V3's template takes arguments as text only.
        return is_preserved("{}")


def add_response_schema(processing_class: ProcessingClassT) -> ProcessingClassT:
    """Gives a tokenizer the response template that reads the answers of its chat template, with their tool calls.

    Of a processor it is the tokenizer inside that gets it. A template that writes thoughts and no tool calls, as those
    of DeepSeek-R1's distilled models, gets one that tells the thought from the answer. What the tokenizer has already
    stays.

    Returns:
        What was given.

    Raises:
        ValueError: the chat template writes neither, or tool calls in a format that is not known.
    """
    given: Any = processing_class
    reader = text_side(given)
    try:
        template = find_response_template(reader)
    except ValueError as error:
        thoughts = None if _writes_calls(error) else find_thought_template(reader)
        if thoughts is None:
            raise
        template = thoughts
    tokenizer = given.tokenizer if isinstance(given, ProcessorMixin) else given
    tokenizer.response_template = template
    return processing_class


def parse_response(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    prefix: list[int] | None = None,
    tools: list[dict | Callable] | None = None,
) -> dict[str, Any]:
    """Returns a completion as the assistant's message, by the tokenizer's response template (see parse_message).

    Args:
        tokenizer: as `add_response_schema` leaves it.
        ids: the completion's tokens, a list or a vector.
        prefix: the tokens before it, which may have opened a thought. None: nothing was opened. TRL then reads no tool
            calls at all.
        tools: JSON schemas or functions, which say of what type arguments are that are written as text.

    Raises:
        TypeError: `ids` or `prefix` is a batch, which TRL does not take either.
    """
    return parse_message(tokenizer, _tokens("ids", ids), [] if prefix is None else _tokens("prefix", prefix), tools)


def _tokens(name: str, given: Any) -> list[int]:
    found: list[Any] = given.tolist() if hasattr(given, "tolist") else given
    if any(isinstance(each, list | tuple) or getattr(each, "ndim", 0) for each in found):
        raise TypeError(
            f"{name}: expected the tokens of one completion, got a batch of {len(found)} such lists; "
            "parse each by itself, [parse_response(tokenizer, each) for each in ids]"
        )
    return found
