"""Reads a completion as a message: its text, its reasoning and the tools that it calls.

transformers' `parse_response` does the reading, by the tokenizer's `response_template`. Few tokenizers bring one, so
here are those of the formats that open models were taught to call tools in. Which of them a chat template writes is
found out by having it write a call: the format is the one that reads the same call back.
"""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Names that no template has of its own.
_CALL = {"type": "function", "function": {"name": "probe_f81c", "arguments": {"key_07de": "value_5a9b"}}}
_ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]
_RESULT = {"role": "tool", "name": "probe_f81c", "content": "result_c360"}
_SHOWN_CHARACTERS = 200


def _region(start: str, end: str, content: str = "text", **more: Any) -> dict[str, Any]:
    """Matches what stands between two markers, as regular expressions; white space after it belongs to nothing."""
    return {"open_pattern": start, "close_pattern": rf"(?:{end})\s*", "content": content, **more}


def _calls(start: str, end: str, content: str = "json", **more: Any) -> dict[str, Any]:
    """Describes tool calls: an object with name and arguments, or, where `start` has the name, the arguments alone."""
    named = {"name": "{name}", "arguments": "{content}"} if "?P<name>" in start else "{content}"
    return _region(start, end, content, repeats=True, transform={"type": "function", "function": named}, **more)


def _format(header: str, calls: dict[str, Any], end: str, **reasoning: dict[str, Any]) -> dict[str, Any]:
    """Returns a response template: after `header` come maybe a thought, then calls, and text up to `end`."""
    text = {"close_pattern": rf"(?:{end})\s*", "content": "text"}
    fields = {**reasoning, "tool_calls": calls, "content": text}
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": header, "fields": fields}


def _parameters(pattern: str) -> dict[str, Any]:
    """Describes arguments with a tag each: texts, which `parse_response` gives the types of the tool's schema."""
    return {"content": "xml-inline", "content_args": {"tag_pattern": pattern, "value_parser": {"name": "text"}}}


_THOUGHT = _region("<think>", "</think>")
_CHATML = r"<\|im_start\|>assistant\n"
_JSON_CALLS = _calls("<tool_call>", "</tool_call>")
_XML_CALLS = _calls(
    r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "</tool_call>",
    **_parameters(r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"),
)
# An argument is a string, a list or mapping with others in it, or anything up to the next comma.
_NESTED = r"""(?P<nested>[\[{](?:[^][{}'"]|'[^']*'|"[^"]*"|(?&nested))*[\]}])"""
_ASSIGNMENT = rf"(?P<key>\w+)=(?P<value>'[^']*'|{_NESTED}|[^,)]*)"
_PYTHON_STRINGS = {"string_delims": [["'", "'"]], "allow_non_json": True}

# By the models that have them; docs/grpo.md lists them.
RESPONSE_TEMPLATES: dict[str, dict[str, Any]] = {
    "Qwen 2.5, Qwen 3, Hermes": _format(_CHATML, _JSON_CALLS, r"<\|im_end\|>", reasoning_content=_THOUGHT),
    # The template has opened a thought, maybe an empty one; it is one only if the completion closes it. Of Qwen 3.5's
    # it would not say so, and so stands before it.
    "Nemotron 3": _format(
        _CHATML + r"<think>(?:\n(?!\n)|</think>)",
        _XML_CALLS,
        r"<\|im_end\|>",
        reasoning_content=_region("(?=.*</think>)", "</think>"),
    ),
    "Qwen 3.5": _format(_CHATML, _XML_CALLS, r"<\|im_end\|>", reasoning_content=_THOUGHT),
    "GLM 4": _format(
        r"<\|assistant\|>",
        _calls(
            r"<tool_call>\s*(?P<name>[^\s<]+)",
            "</tool_call>",
            **_parameters(r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
        ),
        r"<\|user\|>|<\|observation\|>|$",
        reasoning_content=_THOUGHT,
    ),
    "Llama 3.1, Llama 3.2": _format(
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        _calls(r'\{\s*"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*', r"\}\s*<\|eot_id\|>"),
        r"<\|eot_id\|>",
    ),
    "Gemma 4": _format(
        r"<\|turn>model\n|<tool_response\|>",
        _calls(
            r"<\|tool_call>call:(?P<name>\w+)",
            r"<tool_call\|>",
            content_args={"unquoted_keys": True, "string_delims": [['<|"|>'] * 2]},
        ),
        r"<turn\|>|<\|tool_response>|<eos>|$",
        reasoning_content=_region(r"<\|channel>thought\n", r"<channel\|>"),
    ),
    "LFM 2": _format(
        _CHATML,
        # One block for all calls of a turn, written as Python does.
        _calls(
            r"(?:<\|tool_call_start\|>\[|(?<=<\|tool_call_start\|>.*\)),\s*)(?P<name>\w+)\(",
            r"\)(?:\]<\|tool_call_end\|>)?",
            content="xml-inline",
            content_args={"tag_pattern": _ASSIGNMENT, "value_parser": {"name": "json", "args": _PYTHON_STRINGS}},
        ),
        r"<\|im_end\|>",
        thinking=_THOUGHT,
    ),
    "gpt-oss": {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"<\|start\|>assistant",
        "fields": {
            "thinking": _region(r"<\|channel\|>analysis<\|message\|>", r"<\|end\|>"),
            "tool_calls": _calls(
                r"to=functions\.(?P<name>[^\s<]+)\s*<\|channel\|>commentary(?:\s+json)?<\|message\|>", r"<\|call\|>"
            ),
            "content": _region(r"<\|channel\|>final<\|message\|>", r"<\|return\|>|<\|end\|>"),
        },
    },
}


def find_response_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the tokenizer's response template, or the one that reads what its chat template writes.

    Raises:
        ValueError: there is no chat template, it does not write tool calls and their results, or in an unknown format.
    """
    rendered = _written_call(tokenizer)
    if tokenizer.response_template is not None:
        return tokenizer.response_template
    for template in [*RESPONSE_TEMPLATES.values(), *_with_own_turns(tokenizer)]:
        try:
            message = tokenizer.parse_response("", template, prefix=rendered)
        except ValueError:
            continue
        if message == {"role": "assistant", "tool_calls": [_CALL]}:
            return template
    raise ValueError(
        f"tools: {_described(tokenizer)} writes tool calls in a format that is not known; expected that of "
        f"{'; '.join(RESPONSE_TEMPLATES)}, or calls in <tool_call> tags, or a tokenizer whose response_template says "
        f"how to read them (transformers' response parsing). It writes a call as {rendered[-_SHOWN_CHARACTERS:]!r}"
    )


def _with_own_turns(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Returns response templates for calls in `<tool_call>` tags within turns of the chat template's own kind.

    A turn begins with what the generation prompt adds, a thought that it opens not counted, and ends with what the
    template writes behind an answer. Empty if these cannot be told.
    """
    answer = "answer_5b1e"

    def rendered(*messages: dict[str, Any], prompt: bool = False) -> str:
        text: Any = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=prompt)
        return text

    try:
        asked, prompted = rendered(_ASKED[0]), rendered(_ASKED[0], prompt=True)
        answered = rendered(_ASKED[0], {"role": "assistant", "content": answer})
    except (TemplateError, TypeError):
        return []
    header = prompted.removeprefix(asked).partition("<think>")[0]
    end = answered.rpartition(answer)[2].strip()
    if not prompted.startswith(asked) or not header.strip() or not end:
        return []
    own = re.escape(header), re.escape(end)
    return [_format(own[0], calls, own[1], reasoning_content=_THOUGHT) for calls in (_JSON_CALLS, _XML_CALLS)]


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
    return asked


def _rendered_calls(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> tuple[str, str]:
    """Returns conversations that end with a tool call and with its result; arguments as JSON if need be.

    DeepSeek-V3's template takes them as text only.
    """

    def rendered(arguments: dict[str, Any] | str) -> tuple[str, str]:
        call = {"type": "function", "function": {"name": _RESULT["name"], "arguments": arguments}}
        asked = [_ASKED[0], {**_ASKED[1], "tool_calls": [call]}]
        texts: Any = [tokenizer.apply_chat_template(each, tokenize=False) for each in (asked, [*asked, _RESULT])]
        return texts[0], texts[1]

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
    except (ValueError, TypeError):
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
    tokenizer: PreTrainedTokenizerBase, results: list[dict[str, Any]], **template_kwargs: Any
) -> list[int]:
    """Returns the tokens between a completion that called tools and the next: the results, an answer's beginning.

    They are what a conversation that ends with the results has beyond one that ends with the call. If that does not
    begin as this one does but ends with the end token, the token's number is the same in both, so that it does not
    matter if the template writes the turn differently once another follows it (Qwen 3 does: no empty thought).

    Args:
        results: messages of the role "tool", one or more.

    Raises:
        ValueError: the template does not end the call with the end token, and writes it differently when its results
            follow.
    """
    call = {"type": "function", "function": {"name": results[0]["name"], "arguments": {}}}
    asked = [_ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]

    def tokens(messages: list[dict], ends: bool) -> list[int]:
        options = {**template_kwargs, "add_generation_prompt": not ends, "tokenize": True, "return_dict": True}
        encoded: Any = tokenizer.apply_chat_template(messages, **options)
        return encoded["input_ids"]

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


def _described(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    shown = template if isinstance(template, str) else str(template)
    return f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__!r} ({shown[:80]!r}…)"
