"""Prompts with given completions: what their tokens are, and what is cut."""

import pytest
from datasets import Dataset, IterableDataset

from support.tokenizer import build_tokenizer
from trl_fast.data.prompt_completion import prepare_given_completions, split_conversations


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def conversation(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_a_conversation_is_split_before_its_last_answer(tokenizer):
    messages = conversation("Hi?", "Hello.", "What?", "This.")
    (row,) = split_conversations(Dataset.from_list([{"messages": messages}]))
    assert row["prompt"] == messages[:-1] and row["completion"] == messages[-1:]
    (ready,) = prepare_given_completions(Dataset.from_list([row]), tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    opened = tokenizer.apply_chat_template(messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)[
        "input_ids"
    ]
    assert ready["prompt_ids"] == opened and ready["prompt_ids"] + ready["completion_ids"] == whole


def test_text_ends_with_the_end_token(tokenizer):
    (row,) = prepare_given_completions(Dataset.from_list([{"prompt": "What?", "completion": " This."}]), tokenizer)
    assert row["completion_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"][:-1]) == "What? This."


def test_long_rows_lose_the_beginning_of_their_prompt(tokenizer):
    data = Dataset.from_list([{"prompt": "What is this? " * 5, "completion": " This."}])
    (whole,) = prepare_given_completions(data, tokenizer)
    limit = len(whole["completion_ids"]) + 3
    (cut,) = prepare_given_completions(data, tokenizer, max_length=limit)
    assert cut["completion_ids"] == whole["completion_ids"] and cut["prompt_ids"] == whole["prompt_ids"][-3:]


def test_rows_that_are_ready_and_streams(tokenizer):
    rows = [{"prompt": "What?", "completion": " This."}]
    ready = prepare_given_completions(Dataset.from_list(rows), tokenizer)
    assert prepare_given_completions(ready, tokenizer) is not None and len(ready) == 1
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert next(iter(prepare_given_completions(stream, tokenizer)))["prompt_ids"] == ready[0]["prompt_ids"]
    with_prompt = Dataset.from_list([{"messages": conversation("a", "b"), "prompt": "x"}])
    assert split_conversations(with_prompt) is with_prompt
