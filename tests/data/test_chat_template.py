"""Conversations into messages and text, against TRL's functions."""

import copy

import pytest
import trl

from support.tokenizer import build_tokenizer
from trl_fast.data import (
    apply_chat_template,
    is_conversational_from_value,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
)

USER = {"role": "user", "content": "What color is the sky?"}
ANSWER = {"role": "assistant", "content": "It is blue."}
OTHER = {"role": "assistant", "content": "It is green."}
TOOL = {"role": "tool", "content": "42"}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]

ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "prompt": {"prompt": [USER]},
    "prompt after a tool": {"prompt": [USER, ANSWER, TOOL]},
    "prompt left open": {"prompt": [USER, ANSWER]},
    "prompt and completion": {"prompt": [USER], "completion": [ANSWER]},
    "several turns": {"prompt": [USER, ANSWER, USER], "completion": [OTHER, USER, ANSWER]},
    "unpaired": {"prompt": [USER], "completion": [ANSWER], "label": True},
    "preference": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "implicit prompt": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "template arguments": {"prompt": [USER], "completion": [ANSWER], "chat_template_kwargs": {"thinking": False}},
    "other columns": {"messages": [USER, ANSWER], "source": "here"},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_text_as_trl_makes_it(row, tools):
    tokenizer = build_tokenizer()
    for ours, theirs in (
        (apply_chat_template, trl.apply_chat_template),
        (maybe_apply_chat_template, trl.maybe_apply_chat_template),
    ):
        assert ours(row, tokenizer, tools) == theirs(row, tokenizer, tools)
    keyword = {} if "chat_template_kwargs" in row else {"thinking": False}
    assert apply_chat_template(row, tokenizer, **keyword) == trl.apply_chat_template(row, tokenizer, **keyword)


def test_text_stays_text():
    row = {"prompt": "The sky is", "completion": " blue."}
    assert maybe_apply_chat_template(row, build_tokenizer()) is row


def test_a_generation_prompt_that_the_conversation_does_not_have():
    row = {"prompt": [USER], "completion": [ANSWER], "chat_template_kwargs": {"thinking": False}}
    text = apply_chat_template(row, build_tokenizer())
    assert text["prompt"].endswith("assistant\n") and text["completion"].startswith("It is blue.")


def test_bad_rows_are_named():
    tokenizer = build_tokenizer()
    with pytest.raises(KeyError, match="chosen.*prompt.*expected"):
        apply_chat_template({"prompt": [USER], "chosen": [ANSWER]}, tokenizer)
    with pytest.raises(ValueError, match="role 'system'.*'user', 'tool' or 'assistant'"):
        apply_chat_template({"prompt": [{"role": "system", "content": "Be short."}]}, tokenizer)


FROM_VALUE = [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hi"}]
CONVERTIBLE = [
    {"conversations": FROM_VALUE},
    {"conversations": FROM_VALUE, "system": "Be short.", "id": 3},
    {"conversations": [USER, ANSWER]},
    {"messages": FROM_VALUE},
    {"prompt": FROM_VALUE[:1], "completion": FROM_VALUE[1:]},
    {"chosen": FROM_VALUE, "rejected": FROM_VALUE},
    {"messages": [{"from": "user", "value": "Hello", "weight": 1.0}]},
    {"messages": [USER, ANSWER]},
    {"prompt": "text", "completion": "more"},
    {"conversations": "text"},
]


@pytest.mark.parametrize("row", CONVERTIBLE)
def test_conversion_to_chatml(row):
    before = copy.deepcopy(row)
    assert maybe_convert_to_chatml(row) == trl.maybe_convert_to_chatml(copy.deepcopy(row))
    assert row == before
    assert is_conversational_from_value(row) == trl.is_conversational_from_value(row)


def test_no_messages_at_all():
    assert not is_conversational_from_value({"conversations": []})
    assert not is_conversational_from_value({"conversations": None})
