"""Reads a completion as a message: its text, its reasoning and the tools that it calls.

transformers' `parse_response` does the reading, by the tokenizer's `response_template`. Few tokenizers bring one, so
here are those of the formats that open models were taught to call tools in. Which of them a chat template writes is
found out by having it write a call: the format is the one that reads the same call back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from trl_fast.data.images.messages import prepare_multimodal_messages
from trl_fast.data.images.reader import ImageReader

from .response_formats import CALL_FORMATS, RESPONSE_TEMPLATES, thought_template, turn_templates

# Names that no template has of its own. Mistral's takes ids of nine letters and digits only.
_CALL = {
    "type": "function",
    "id": "id8f3c70a",
    "function": {"name": "probe_f81c", "arguments": {"key_07de": "value_5a9b"}},
}
_ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]
_ANSWERED = [_ASKED[0], {"role": "assistant", "content": "answer_5b1e"}]
_RESULT: dict[str, Any] = {"role": "tool", "name": "probe_f81c", "tool_call_id": _CALL["id"], "content": "result_c360"}
_SHOWN_CHARACTERS = 200


def find_response_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the tokenizer's response template, or the one that reads what its chat template writes.

    Raises:
        ValueError: there is no chat template, it does not write tool calls and their results, or in an unknown format.
    """
    rendered = _written_call(tokenizer)
    if tokenizer.response_template is not None:
        return tokenizer.response_template
    for template in [*RESPONSE_TEMPLATES.values(), *_with_own_turns(tokenizer)]:
        if _reads_probe(tokenizer, template, rendered):
            return template
    raise ValueError(
        f"tools: {_described(tokenizer)} writes tool calls in a format that is not known; expected that of "
        f"{'; '.join(RESPONSE_TEMPLATES)}; {'; '.join(CALL_FORMATS)}; or a tokenizer whose response_template says "
        f"how to read them (transformers' response parsing). It writes a call as {rendered[-_SHOWN_CHARACTERS:]!r}"
    )


def find_thought_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Returns a response template that tells a thought, which the generation prompt opens by <think>, from the answer.

    It reads no tool calls. None: there is no such prompt, or where a turn begins and ends cannot be told.
    """
    try:
        asked, prompted = _text(tokenizer, _ASKED[:1]), _text(tokenizer, _ASKED[:1], prompt=True)
        answered = _text(tokenizer, _ANSWERED)
    except (TemplateError, TypeError, ValueError):
        return None
    header, opened, _ = prompted.removeprefix(asked).partition("<think>")
    end = answered.rpartition(_ANSWERED[1]["content"])[2].strip()
    return thought_template(header, end) if header and opened and end else None


def _reads_probe(tokenizer: PreTrainedTokenizerBase, template: dict[str, Any], rendered: str) -> bool:
    """Says whether a response template reads nothing but the probe's call, maybe with another id."""
    try:
        message = tokenizer.parse_response("", template, prefix=rendered)
    except (ValueError, LookupError):
        return False
    calls = [{**call, "id": _CALL["id"]} for call in message.pop("tool_calls", [])]
    return message == {"role": "assistant"} and calls == [_CALL]


def _with_own_turns(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Returns response templates for the formats of calls within turns of the chat template's own kind.

    A turn begins with what the generation prompt adds, a thought that it opens or closes not counted; where it adds
    nothing, to a question (Mistral) or to results (DeepSeek), with what ends these. It ends with what the template
    writes behind an answer. Empty if these cannot be told.
    """
    # Ids of results are no part of what ends them.
    other = {**_RESULT, "tool_call_id": "id0b7e4ff"}
    try:
        asked, prompted = _text(tokenizer, _ASKED[:1]), _text(tokenizer, _ASKED[:1], prompt=True)
        answered = _text(tokenizer, _ANSWERED)
        results = [_text(tokenizer, [*_ASKED, result], prompt=True) for result in (_RESULT, other)]
    except (TemplateError, TypeError):
        return []
    added = prompted.removeprefix(asked) or asked.rpartition(_ASKED[0]["content"])[2]
    headers = [re.split(r"</?(?:seed:)?think>|\[/?THINK\]", added)[0]]
    behind_results = _common_end(*(text.rpartition(_RESULT["content"])[2] for text in results))
    if headers[0] not in behind_results:
        headers.append(behind_results)
    end = answered.rpartition(_ANSWERED[1]["content"])[2].strip()
    if not prompted.startswith(asked) or not all(map(str.strip, headers)) or not end:
        return []
    return turn_templates(headers, end)


def _common_end(*texts: str) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _written_call(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a conversation that ends with a tool call, as the chat template writes it."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tools: the tokenizer {tokenizer.name_or_path!r} has no chat template; expected one with tool calls"
        )
    expected = "expected one that writes assistant messages with tool_calls, and messages of the role 'tool'"
    function: Any = _CALL["function"]
    try:
        asked, whole = _rendered_calls(tokenizer, function["arguments"])
    except (TemplateError, TypeError) as error:
        raise ValueError(f"tools: {_described(tokenizer)} fails on a tool call ({error}); {expected}") from error
    parts = (function["name"], *function["arguments"], *function["arguments"].values(), _RESULT["content"])
    lost = [part for part in parts if part not in whole]
    if lost:
        raise ValueError(f"tools: {_described(tokenizer)} leaves tool calls or their results out; {expected}")
    return asked.removesuffix(_lasting_prompt(tokenizer))


def _text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], prompt: bool = False, **more: Any
) -> str:
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **more)
    return text


def _lasting_prompt(tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> str:
    """Returns the end of a turn and the generation prompt if a template writes it at each conversation's end, else "".

    Command R7B's does.
    """
    asked = _text(tokenizer, _ASKED[:1], **template_kwargs)
    if _text(tokenizer, _ASKED[:1], prompt=True, **template_kwargs) != asked:
        return ""
    return _common_end(asked, _text(tokenizer, _ANSWERED, **template_kwargs))


def _rendered_calls(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> tuple[str, str]:
    """Returns conversations that end with a tool call and with its result; arguments as JSON if need be.

    DeepSeek-V3's template takes them as text only.
    """

    def rendered(arguments: dict[str, Any] | str) -> tuple[str, str]:
        call = {**_CALL, "function": {"name": _RESULT["name"], "arguments": arguments}}
        asked = [_ASKED[0], {**_ASKED[1], "tool_calls": [call]}]
        return _text(tokenizer, asked), _text(tokenizer, [*asked, _RESULT])

    try:
        return rendered(arguments)
    except TypeError:
        return rendered(json.dumps(arguments))


def parse_message(
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: list[int],
    prompt_ids: list[int],
    tools: list[Any] | None = None,
) -> dict[str, Any]:
    """Returns a completion as the assistant's message, by the tokenizer's response template; as TRL does.

    Args:
        completion_ids: the tokens that were sampled.
        prompt_ids: all tokens before them, for what the template wrote of the answer already.
        tools: JSON schemas, which say of what type arguments are that are written as text.

    Returns:
        role and content, and where there are any, `tool_calls`, a list of
        {"type": "function", "function": {"name": …, "arguments": …}}, and fields of the template, such as
        reasoning_content. What cannot be read, a call with broken JSON for instance, is all content.
    """
    try:
        message = tokenizer.parse_response(completion_ids, prefix=prompt_ids, tools=tools) if completion_ids else {}
        for call in message.get("tool_calls") or []:
            _complete_call(call)
    except (ValueError, TypeError, LookupError):
        return {"role": "assistant", "content": tokenizer.decode(completion_ids, skip_special_tokens=True)}
    content = message.get("content") or ""
    if isinstance(content, str) and tokenizer.eos_token:
        content = content.removesuffix(tokenizer.eos_token)
    return {"role": "assistant", **message, "content": content}


def _complete_call(call: Any) -> None:
    """Gives a call without arguments an empty object of them.

    Raises:
        ValueError: it has no name.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{call!r} is no tool call; expected a function's name and arguments")
    if function.get("arguments") is None:
        function["arguments"] = {}


def tool_turn_ids(
    tokenizer: PreTrainedTokenizerBase,
    results: list[dict[str, Any]],
    earlier: int = 0,
    *,
    images: tuple[ImageReader, Sequence[Image]] | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Returns the tokens between a completion that called tools and the next: the results, an answer's beginning.

    They are what a conversation that ends with the results has beyond one that ends with the call. If that does not
    begin as this one does but ends with the end token, the token's number is the same in both, so that it does not
    matter if the template writes the turn differently once another follows it (Qwen 3 does: no empty thought).

    Args:
        results: messages of the role "tool", one or more. One without `tool_call_id` gets one for the template.
        earlier: how many calls of the completion were answered before; some templates number calls.
        images: what makes tokens of text with images, and those of the results; None: there are none.

    Raises:
        ValueError: the template does not end the call with the end token, and writes it differently when its results
            follow.
    """
    history, results = _call_history(results, earlier)
    lasting = _lasting_prompt(tokenizer, **template_kwargs)

    def tokens(messages: list[dict], ends: bool) -> list[int]:
        messages = messages if images is None else prepare_multimodal_messages(messages)
        text = _text(tokenizer, messages, prompt=not ends, **template_kwargs)
        text = text.removesuffix(lasting) if ends else text
        if images is not None:
            reader, pictures = images
            return reader.text_ids(text, () if ends else pictures)
        encoded: Any = tokenizer(text, add_special_tokens=False)
        return encoded["input_ids"]

    try:
        asked = [*history, _calling(results)]
        before, whole = tokens(asked, True), tokens(asked + results, False)
    except TemplateError:
        # Llama's takes one call a turn.
        asked = [*history, _calling(results[:1])]
        before, whole = tokens(asked, True), tokens(asked + results, False)
    # The model stops at a special token; white space behind it is the template's.
    special = set(tokenizer.all_special_ids)
    stop = max((place for place, token in enumerate(before) if token in special), default=len(before)) + 1
    if not str(tokenizer.decode(before[stop:])).strip():
        before = before[:stop]
    if whole[: len(before)] == before:
        return whole[len(before) :]
    end = tokenizer.eos_token_id
    places = [place for place, token in enumerate(whole) if token == end]
    if before[-1] == end and len(places) >= before.count(end):
        return whole[places[before.count(end) - 1] + 1 :]
    raise ValueError(
        f"tools: {_described(tokenizer)} writes a tool call differently when its results follow, and does not end it "
        f"with the end token {tokenizer.eos_token!r}; expected one that only adds to what it wrote before"
    )


def _calling(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a message with calls, without arguments, that have the results."""
    calls = [
        {"type": "function", "id": result["tool_call_id"], "function": {"name": result["name"], "arguments": {}}}
        for result in results
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _call_history(results: list[dict[str, Any]], earlier: int) -> tuple[list[dict], list[dict[str, Any]]]:
    """Returns a question with calls that were answered before, and the results with an id each."""
    told = {**results[0], "content": _RESULT["content"]}
    before = [{**told, "tool_call_id": f"{index:09}"} for index in range(earlier)]
    turns = [message for result in before for message in (_calling([result]), result)]
    numbered = [{"tool_call_id": f"{earlier + index:09}", **result} for index, result in enumerate(results)]
    return [_ASKED[0], *turns], numbered


def _described(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    shown = template if isinstance(template, str) else str(template)
    return f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__!r} ({shown[:80]!r}…)"
