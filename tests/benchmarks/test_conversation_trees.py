"""Tokens of conversations, counted apart and in trees."""

from importlib.resources import files

from benchmarks.conversation_trees import _call, count, with_thoughts
from support.tokenizer import build_tokenizer

SAID = ["What color is the sky? " * 4, "blue", "And the sea?", "green"]
ROW = {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(SAID)]}


def test_tokens_apart_and_in_trees():
    tokenizer = build_tokenizer()
    plain = count([ROW, ROW], tokenizer, 0, thought_beside=False)
    # The second turn goes on from the first.
    assert plain[:2] == (2, 4) and plain.levels == 1 and plain.shared < plain.apart < 2 * plain.shared
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    thinking = count([ROW], tokenizer, 6, thought_beside=False)
    assert thinking.levels == 2 and plain.shared // 2 < thinking.shared < thinking.apart


def test_thoughts_are_the_conversations_own_words():
    messages = with_thoughts(ROW, 3, beside=True)["messages"]
    assert messages[1] == {"role": "assistant", "content": "blue", "thinking": "color is the"}
    assert with_thoughts(ROW, 2, beside=False)["messages"][3]["content"] == "<think>\nthe sky?\n</think>\n\ngreen"


def test_calls_are_read():
    assert _call("sort('a.txt', by='name')")["function"] == {
        "name": "sort",
        "arguments": {"argument_0": "a.txt", "by": "name"},
    }
