"""Turns of the assistant, each with its own context: against what the chat template shows at inference."""

from importlib.resources import files

import pytest

from support.tokenizer import build_tokenizer
from trl_fast.data.assistant_turns import (
    changed_turns,
    joined_rows,
    split_turns,
    turn_chat_template,
    turn_rows,
)
from trl_fast.data.segments import num_tokens
from trl_fast.data.sft_batch import IGNORED, LabelledCollator, join_beginnings
from trl_fast.data.sft_dataset import SFTFormat, tokenize_turns

TEMPLATES = files("trl") / "chat_templates"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, thought, style):
    """A message as the family's data have it: the thought in the text, or beside it."""
    if style == "content":
        return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{text}"}
    return {"role": "assistant", "content": text, style: thought}


STYLES = {
    "qwen3": "content",
    "qwen3_6": "reasoning_content",
    "deepseek_r1_distill": "content",
    "deepseekv3": "content",
    "gptoss": "thinking",
    "glm4moe": "reasoning_content",
    "lfm2_2_5": "content",
    "gemma3": "content",
}


@pytest.mark.parametrize("name", STYLES)
def test_a_turn_follows_what_the_template_shows_at_inference(name):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    style = STYLES[name]
    messages = [user("Sky?"), assistant("Blue.", "Look up.", style), user("Sea?"), assistant("Green.", "Dive.", style)]
    how = SFTFormat(separates_turns=True, chat_template=turn_chat_template(tokenizer))
    turns = split_turns(tokenize_turns({"messages": messages}, tokenizer, how))
    contexts = []
    for end, (ids, labels) in zip((1, 3), turns, strict=True):
        start = next(index for index, label in enumerate(labels) if label != IGNORED)
        contexts.append(tokenizer.decode(ids[:start]))
        prompt = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True, tokenize=False)
        assert contexts[-1] == prompt and labels[start:] == ids[start:]
    # The thought is learned in its own turn; only templates that keep thoughts show it later.
    said = [tokenizer.decode([label for label in labels if label != IGNORED]) for _, labels in turns]
    assert "Look up." in said[0] and "Blue." in said[0] and "Dive." in said[1] and "Green." in said[1]
    assert ("Look up." in contexts[1]) == (name in ("gemma3",))


def test_which_turns_of_a_row_are_learned():
    one, two = {"role": "assistant", "content": "1"}, {"role": "assistant", "content": "2", "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "3"}
    row = {"prompt": [user("a"), one, user("b")], "completion": [two, tool, one], "tools": [1]}
    expected = [
        {"tools": [1], "prompt": [user("a")], "completion": [one]},
        {"tools": [1], "prompt": [user("a"), one, user("b")], "completion": [two]},
        {"tools": [1], "prompt": [user("a"), one, user("b"), two, tool], "completion": [one]},
    ]
    assert turn_rows(row, completion_only=False) == expected
    assert turn_rows(row, completion_only=True) == expected[1:]
    messages = {"messages": row["prompt"] + row["completion"], "tools": [1]}
    assert turn_rows(messages, completion_only=True) == expected
    with pytest.raises(ValueError, match=r"needs conversations, but the row has \['text'\]"):
        turn_rows({"text": "Hi"}, completion_only=False)


def test_sequences_of_a_row_are_changed_one_by_one():
    row = joined_rows([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}])
    assert row == {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "seq_lengths": [2, 1]}
    assert split_turns(row) == [([1, 2], [-100, 2]), ([3], [3])]
    kept = changed_turns(row, lambda ids, labels: None if len(ids) < 2 else {"input_ids": ids, "labels": labels})
    assert kept == {"input_ids": [1, 2], "labels": [-100, 2], "seq_lengths": [2]}


def test_turns_that_go_on_are_one_sequence_and_others_share_what_they_begin_with():
    # The second goes on from the first; the third begins like them for 20 tokens, the fourth is the third again.
    first, second = [*range(20), 50], [*range(20), 50, 51, 52]
    third = [*range(20), 60, 61]
    labels = [[IGNORED] * 20 + [50], [IGNORED] * 22 + [52], [IGNORED] * 20 + [60, 61], [IGNORED] * 20 + [60, 61]]
    sequences = [*zip((first, second, third, third), labels, strict=True)]
    joined, _ = join_beginnings(sequences)
    # What both learn counts twice, so that the third and the fourth stay.
    assert joined == [(second, [IGNORED] * 20 + [50, IGNORED, 52]), *sequences[2:]]
    row = joined_rows({"input_ids": ids, "labels": each} for ids, each in sequences)
    batches = {
        layout: LabelledCollator(0, layout, joins=True).collate([row]) for layout in ("shared_prefix", "packed")
    }
    shared = batches["shared_prefix"]
    # Two tokens are too few to share.
    assert shared.tree_lengths == ((20, 3, 2, 2),)
    assert shared.input_ids.numel() == num_tokens(shared.tree_lengths[0]) < batches["packed"].input_ids.numel()
    assert {batch.num_tokens for batch in batches.values()} == {21 + 23 + 22 + 22}
    for name in ("targets", "branch", "offset", "branch_lengths"):
        assert shared[name].tolist() == batches["packed"][name].tolist()
