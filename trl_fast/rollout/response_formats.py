"""Describes how open models write thoughts and tool calls, as response templates of transformers.

A response template says where an assistant's turn begins and what stands in it between which markers, as regular
expressions (transformers' documentation on response parsing has all fields).
"""

from __future__ import annotations

import re
from typing import Any


def _region(start: str, end: str, content: str = "text", **more: Any) -> dict[str, Any]:
    """Matches what stands between two markers, as regular expressions; white space after it belongs to nothing."""
    return {"open_pattern": start, "close_pattern": rf"(?:{end})\s*", "content": content, **more}


def _calls(start: str, end: str, content: str = "json", **more: Any) -> dict[str, Any]:
    """Describes tool calls: an object with name and arguments, or, where `start` has the name, the arguments alone.

    Where `start` has the id of a call, the call keeps it.
    """
    named = {"name": "{name}", "arguments": "{content}"} if "?P<name>" in start else "{content}"
    numbered = {"id": "{id}"} if "?P<id>" in start else {}
    transform = {"type": "function", **numbered, "function": named}
    return _region(start, end, content, repeats=True, transform=transform, **more)


def _listed(start: str, end: str, name: str = "{name}", arguments: str = "{arguments}", **more: str) -> dict[str, Any]:
    """Describes tool calls that stand in one JSON list; the patterns say under which keys."""
    transform = {"type": "function", **more, "function": {"name": name, "arguments": arguments}}
    return _region(start, end, "json", transform_each=True, transform=transform)


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
    r"<(?:seed:)?tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "</(?:seed:)?tool_call>",
    **_parameters(r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"),
)
_TAGGED_CALLS = _calls(
    r"<tool_call>\s*(?P<name>[^\s<]+)",
    "</tool_call>",
    **_parameters(r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
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
        _CHATML + r"<think>(?:\n(?!\n)|</think>|\Z)",
        _XML_CALLS,
        r"<\|im_end\|>",
        reasoning_content=_region("(?=.*</think>)", "</think>"),
    ),
    "Qwen 3.5": _format(_CHATML, _XML_CALLS, r"<\|im_end\|>", reasoning_content=_THOUGHT),
    "GLM 4": _format(
        r"<\|assistant\|>(?:</think>)?",
        _TAGGED_CALLS,
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
    "Cohere Command A, Command R7B": {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>",
        "fields": {
            "reasoning_content": _region(r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
            "tool_calls": _listed(
                r"<\|START_ACTION\|>", r"<\|END_ACTION\|>", "{tool_name}", "{parameters}", id="{tool_call_id}"
            ),
            "content": _region(r"<\|START_(?:TEXT|RESPONSE)\|>", r"<\|END_(?:TEXT|RESPONSE)\|>"),
        },
    },
}


# Where a turn begins and ends is found out for these, and put for END.
_END = "END"
_QUOTED = r"""(?P<list>[\[{](?:[^][{}"]|"(?:[^"\\]|\\.)*"|(?&list))*[\]}])"""
CALL_FORMATS: dict[str, dict[str, Any]] = {
    "JSON in <tool_call> tags": _JSON_CALLS,
    "tags as Qwen 3.5's": _XML_CALLS,
    "tags as GLM 4's": _TAGGED_CALLS,
    # MiniMax M2, DeepSeek V3.2 and V4, MiniCPM 5: tags, some in a wrapper.
    "<invoke> tags": _calls(
        r'(?:<[^<>\s]+calls?>\s*)?<(?:｜DSML｜)?(?:invoke|function) name="(?P<name>[^"]+)">',
        r"</(?:｜DSML｜)?(?:invoke|function)>\s*(?:</[^<>\s]+calls?>)?",
        **_parameters(
            r'<(?P<tag>(?:｜DSML｜)?param(?:eter)?) name="(?P<key>[^"]+)"[^>]*>\s*(?P<value>.*?)\s*</(?P=tag)>'
        ),
    ),
    # Jamba, Apriel, Nemotron Nano 2.
    "a list in <tool_calls> tags": _listed(r"<(?:tool_calls|TOOLCALL)>\s*(?=\[)", "</(?:tool_calls|TOOLCALL)>"),
    # Ministral 3, Devstral; Mistral Small 3.2 with an id.
    "[TOOL_CALLS] with [ARGS]": _calls(
        r"\[TOOL_CALLS\]\s*(?P<name>[^\s\[\]{}]+)\s*\[ARGS\]", rf"(?=\[TOOL_CALLS\])|{_END}|$"
    ),
    "[TOOL_CALLS] with [CALL_ID]": _calls(
        r"\[TOOL_CALLS\]\s*(?P<name>[^\s\[\]{}]+)\s*\[CALL_ID\](?P<id>\w+)\[ARGS\]",
        rf"(?=\[TOOL_CALLS\])|{_END}|$",
    ),
    # Mistral 7B v0.3, Mistral Nemo.
    "[TOOL_CALLS] with a list": _listed(r"\[TOOL_CALLS\]\s*(?=\[)", rf"{_END}|$"),
    "Kimi K2": _calls(
        r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
        r"(?P<id>functions\.(?P<name>[^:\s]+):\d+)\s*<\|tool_call_argument_begin\|>",
        r"<\|tool_call_end\|>\s*(?:<\|tool_calls_section_end\|>)?",
    ),
    "DeepSeek V3.1": _calls(
        "(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?P<name>[^\\s<]+)<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>\\s*(?:<｜tool▁calls▁end｜>)?",
    ),
    "DeepSeek V3": _calls(
        "(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>\\S+)\\s*```json",
        "```<｜tool▁call▁end｜>\\s*(?:<｜tool▁calls▁end｜>)?",
    ),
    # A line a call, written as Python does with values as JSON.
    "OLMo 3": _calls(
        r"(?:<function_calls>\s*|(?<=\)\n)(?<=<function_calls>(?:(?!</function_calls>)(?s:.))*))(?P<name>\w+)\(",
        r"\)(?=\n\s*\w+\(|\s*</function_calls>)(?:\s*</function_calls>)?",
        content="xml-inline",
        content_args={
            "tag_pattern": rf'(?P<key>\w+)=(?P<value>"(?:[^"\\]|\\.)*"|{_QUOTED}|[^,]*)',
            "value_parser": {"name": "json", "args": {"allow_non_json": True}},
        },
    ),
}


def thought_template(header: str, end: str) -> dict[str, Any]:
    """Returns a response template without tool calls, within turns between two texts.

    A thought may have been opened before the answer; it is one only if the answer closes it.
    """
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": rf"{re.escape(header)}(?:<think>\n?)?",
        "fields": {
            "reasoning_content": _region(r"(?:<think>)?(?=(?s:.)*?</think>)", "</think>"),
            "content": {"close_pattern": rf"(?:{re.escape(end)})\s*|$", "content": "text"},
        },
    }


def turn_templates(headers: list[str], end: str) -> list[dict[str, Any]]:
    """Returns a response template for each format of calls, within turns between two texts."""
    # A generation prompt may close the thought that it does not ask for.
    header = f"(?:{'|'.join(map(re.escape, headers))})(?:</think>)?"
    thought = _region(r"<(?:seed:)?think>|\[THINK\]", r"</(?:seed:)?think>|\[/THINK\]")
    ended = [
        {**calls, "close_pattern": calls["close_pattern"].replace(_END, re.escape(end))}
        for calls in CALL_FORMATS.values()
    ]
    return [_format(header, calls, re.escape(end), reasoning_content=thought) for calls in ended]
