"""Prompt and completion as one text, against what TRL 1.16.0's GOLD makes of the same rows."""

import pytest

from support.tokenizer import build_tokenizer
from trl_fast.data.joined_text import tokenize_joined

SPEAKS = {
    "prompt": [{"role": "user", "content": "What color?"}],
    "completion": [{"role": "assistant", "content": "Blue é"}],
}


def decoded(row, tokenizer):
    return [tokenizer.decode(ids) for ids in tokenize_joined(row, tokenizer).values()]


def test_text_is_divided_where_the_prompt_ends():
    tokenizer = build_tokenizer(add_bos=True)
    assert decoded({"prompt": "What color?", "completion": " It is blue"}, tokenizer) == [
        "What color?",
        " It is blue<|im_end|>",
    ]
    # A token of both is the completion's; an end token that is there is not doubled.
    assert decoded({"prompt": "What ", "completion": "color<|im_end|>"}, tokenizer) == ["What", " color<|im_end|>"]


def test_messages_go_through_the_template():
    prompt, completion = decoded(SPEAKS, build_tokenizer())
    assert prompt.endswith("<|im_start|>assistant\n") and completion == "Blue é<|im_end|>\n"


@pytest.mark.parametrize("thinking", [True, False])
def test_a_generation_prompt_that_the_conversation_has_not(thinking):
    """The template's empty thought is in the prompt alone: the prompt ends before it."""
    row = {**SPEAKS, "chat_template_kwargs": {"thinking": thinking}}
    prompt, _ = decoded(row, build_tokenizer())
    assert prompt.endswith("assistant\n")
