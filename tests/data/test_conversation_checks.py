"""Rows that a chat template cannot write as they are meant: the row, the column and the remedy are named."""

import ast
import json
import re

import pytest
from datasets import Dataset, IterableDataset

from support.tokenizer import build_tokenizer
from trl_fast.data import (
    SFTFormat,
    SFTLength,
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_sft_dataset,
    prepare_unpaired_dataset,
    validate,
)
from trl_fast.data.prompt_only import prepare_prompt_dataset

QUESTION = [{"role": "user", "content": "What?"}]
ANSWER = [{"role": "assistant", "content": "That."}]
OTHER = [{"role": "assistant", "content": "This."}]
PAIR = {"prompt": QUESTION, "chosen": ANSWER, "rejected": OTHER}
# A good row of each type of dataset, its preparation, and its columns of messages.
KINDS = {
    "language modelling": ({"messages": QUESTION + ANSWER}, "sft"),
    "prompt and completion": ({"prompt": QUESTION, "completion": ANSWER}, "sft"),
    "preference": (PAIR, "dpo"),
    "implicit prompt": ({"chosen": QUESTION + ANSWER, "rejected": QUESTION + OTHER}, "dpo"),
    "preference for rewards": (PAIR, "reward"),
    "preference, unpaired": (PAIR, "kto"),
    "labelled": ({"prompt": QUESTION, "completion": ANSWER, "label": True}, "kto"),
    "prompt only": ({"prompt": QUESTION}, "prompts"),
}
CASES = [(kind, column) for kind, (row, _) in KINDS.items() for column in row if column != "label"]


PREPARE = {
    "sft": lambda rows, tokenizer: prepare_sft_dataset(rows, tokenizer, SFTFormat(), SFTLength()),
    "dpo": prepare_preference_dataset,
    "reward": prepare_reward_dataset,
    "kto": prepare_unpaired_dataset,
    "prompts": prepare_prompt_dataset,
}


def prepare(how, rows, tokenizer=None):
    """Prepares rows as a stream, which may hold what Arrow could not."""
    stream = IterableDataset.from_generator(lambda: iter(rows))
    return list(PREPARE[how](stream, tokenizer or build_tokenizer()))


@pytest.mark.parametrize("kind", KINDS)
def test_good_rows_pass(kind):
    row, how = KINDS[kind]
    assert len(prepare(how, [row, row])) == (4 if kind == "preference, unpaired" else 2)
    assert PREPARE[how](Dataset.from_list([row]), build_tokenizer())[0] == prepare(how, [row])[0]


@pytest.mark.parametrize("write, read", [(json.dumps, "json.loads"), (repr, "ast.literal_eval")])
@pytest.mark.parametrize("kind", KINDS)
def test_messages_as_text(kind, write, read):
    row, how = KINDS[kind]
    written = {column: value if column == "label" else write(value) for column, value in row.items()}
    message = rf"The train dataset, row 0, column '\w+': .*{read}\(row\['\w+'\]\)"
    with pytest.raises(ValueError, match=message) as error:
        prepare(how, [written])
    remedy = re.search(r"map\((.*)\)\.$", str(error.value))[1]
    column = re.search(r"column '(\w+)'", str(error.value))[1]
    assert eval(remedy, {"json": json, "ast": ast})(written) == {column: row[column]}


def test_text_that_only_looks_like_messages():
    rows = [{"prompt": "[{", "chosen": '["role"]', "rejected": "[{'a': 1}]"}]
    assert len(prepare("dpo", rows)) == 1


BAD_MESSAGES = {
    "no content": ({"role": "user"}, "the content of the 'user' message is missing; expected text; fill it"),
    "None": ({"role": "user", "content": None}, "the content of the 'user' message is missing"),
    "a number": ({"role": "user", "content": 3}, "the content 3 is of type int; expected text"),
    "a role": ({"role": None, "content": "What?"}, "the role is None; expected text such as 'user'"),
    "an image": (
        {"role": "user", "content": [{"type": "image"}]},
        "the content has a part of type 'image', which needs an image",
    ),
    "an empty part": ({"role": "user", "content": [{"type": "text", "text": None}]}, ".* of the content has no text"),
    "a bare part": ({"role": "user", "content": ["What?"]}, "the part 'What\\?' of the content has no type"),
}


@pytest.mark.parametrize("bad", BAD_MESSAGES)
@pytest.mark.parametrize("kind, column", CASES)
def test_bad_messages(kind, column, bad):
    row, how = KINDS[kind]
    message, said = BAD_MESSAGES[bad]
    index = len(row[column]) - 1
    broken = {**row, column: [*row[column][:index], message]}
    with pytest.raises(ValueError, match=rf"^The train dataset, row 1, column '{column}', message {index}: {said}"):
        prepare(how, [row, broken])


def test_a_tool_call_needs_no_content():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls }}\n{% endfor %}"
    assert len(prepare("sft", [{"messages": [*QUESTION, asked]}], tokenizer)) == 1


PARTS = [{"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]}]
READS_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("said", ["m.content + '!'", "m.content"])
@pytest.mark.parametrize("kind, column", CASES)
def test_parts_for_a_template_of_texts(kind, column, said):
    # The first template fails on a list, the second writes it as Python shows it: training saw that.
    row, how = KINDS[kind]
    if kind == "implicit prompt":
        row = {"chosen": PARTS + ANSWER, "rejected": PARTS + OTHER}
        column = "prompt"
    else:
        row = {**row, column: [*PARTS, *row[column]]}
        # Pairs have become single completions.
        column = "completion" if kind == "preference, unpaired" and column != "prompt" else column
    tokenizer = build_tokenizer()
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {said} }}}}{{% endfor %}}"
    with pytest.raises(ValueError, match=rf"row [01], column '{column}', message 0: the content is a list of parts"):
        prepare(how, [row], tokenizer)
    tokenizer.chat_template = READS_PARTS
    assert len(prepare(how, [row], tokenizer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", 'TypeError: can only concatenate str \\(not "int"\\) to str'),
    ],
)
def test_the_row_that_the_template_refuses(kind, template, said):
    row, how = KINDS[kind]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"The train dataset, row 0: the chat template refuses the messages: {said}"):
        prepare(how, [row], tokenizer)


ASKED = {"question": "What?", "chosen": "That.", "rejected": "This."}
QUESTIONS = [
    ASKED,
    {**ASKED, "system": "Be brief."},
    {"instruction": "What?", "input": "", "chosen": "That.", "rejected": "This."},
    {"query": QUESTION, "chosen": ANSWER, "rejected": OTHER},
    {**ASKED, "chosen": "What? That."},
]


@pytest.mark.parametrize("how", ["dpo", "reward", "kto"])
@pytest.mark.parametrize("row", QUESTIONS)
def test_a_question_that_the_model_would_not_see(row, how):
    column = next(iter(row))
    remedy = rf"dataset.rename_column\('{column}', 'prompt'\)"
    with pytest.raises(ValueError, match=f"^The train dataset, row 0: there is no 'prompt'.*'{column}'.*{remedy}"):
        prepare(how, [row])
    with pytest.raises(ValueError, match=f"row 0: there is no 'prompt'.*{remedy}"):
        validate(Dataset.from_list([row]))
    assert len(prepare(how, [{"prompt": row[column], **row}]))


def test_validation_finds_the_rows_with_such_a_question():
    whole = {"question": "What?", "chosen": "What?  THAT.", "rejected": "what? This."}
    report = validate(Dataset.from_list([whole, ASKED]))
    assert [
        (finding.kind.code, finding.row_numbers) for finding in report.findings if finding.severity == "error"
    ] == [("malformed_row", [1])]


@pytest.mark.parametrize("how", ["dpo", "reward", "kto"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "What?", "chosen": "What? That.", "rejected": "What? This."},
        {"instruction": "  what? ", "chosen": QUESTION + ANSWER, "rejected": QUESTION + OTHER},
        {"question": "What?", "input": "nothing", "chosen": "What? That.", "rejected": "What? This."},
        {"question": None, "chosen": "So That.", "rejected": "So This."},
        {"question": "", "chosen": "So That.", "rejected": "So This."},
        {"question": "anything", **PAIR},
    ],
)
def test_a_question_that_the_completions_repeat(row, how):
    assert len(prepare(how, [row]))


@pytest.mark.parametrize(
    "how, row",
    [
        ("prompts", {"question": "What?"}),
        ("kto", {"question": "What?", "completion": "That.", "label": True}),
        ("sft", {"question": "What?", "completion": "That."}),
    ],
)
def test_a_dataset_without_prompts_says_which_column_may_be_one(how, row):
    remedy = r"If 'question' is the prompt, call dataset.rename_column\('question', 'prompt'\)"
    with pytest.raises(ValueError, match=remedy):
        prepare(how, [row])


def test_a_text_beside_which_a_question_stands_is_trained_alone(caplog):
    prepare("sft", [{"question": "What?", "text": "It is that."}] * 2)
    assert caplog.text.count("'text' alone is trained: the text of 'question' is not in it") == 1
    caplog.clear()
    prepare("sft", [{"question": "What?", "text": "What? That."}])
    assert "alone" not in caplog.text


@pytest.mark.parametrize(
    "column, value, said",
    [
        ("tools", "[{", r"'\[\{' is no valid JSON: Expecting"),
        ("tools", '{"name": "f"}', "is of type dict; expected a list"),
        ("chat_template_kwargs", "thinking", "'thinking' is of type str; expected a dict"),
    ],
)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"prompt only"}))
def test_bad_arguments_of_the_template(kind, column, value, said):
    row, how = KINDS[kind]
    with pytest.raises(ValueError, match=f"^The train dataset, row 0: column '{column}': .*{said}"):
        prepare(how, [{**row, column: value}])


@pytest.mark.parametrize("kind", KINDS)
def test_messages_without_a_chat_template(kind):
    row, how = KINDS[kind]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 0: the row has messages, but the tokenizer has no chat template; set"):
        prepare(how, [row], tokenizer)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"prompt only"}))
def test_a_system_column_that_is_not_read(kind, caplog):
    row, how = KINDS[kind]
    prepare(how, [{**row, "system": "Be brief."}] * 2)
    assert caplog.text.count("the column 'system' ('Be brief.') is not read, and the model does not see it") == 1
    caplog.clear()
    said = {"role": "system", "content": "Be  BRIEF."}
    first = next(column for column in row if column != "label")
    both = [first, "rejected"] if kind == "implicit prompt" else [first]
    prepare(how, [{**row, **{column: [said, *row[column]] for column in both}, "system": "Be brief."}])
    prepare(how, [{**row, "system": None}])
    assert "is not read" not in caplog.text
