"""Checks of single rows: each finds its planted defect, and nothing in good rows."""

import random
import time
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from support.tokenizer import BOS, EOS, build_tokenizer
from trl_fast.data import prepare_preference_dataset, validate
from trl_fast.data.validation.text_checks import NEAR_IDENTICAL_SHARE, main_script, word_similarity

# What is always said.
FACTS = {"length_share", "label_balance"}
SENTENCE = "Mercury is the planet closest to the sun and it has no moons at all while the Earth has one we see"


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def assistant(content):
    return message("assistant", content)


def user(content):
    return message("user", content)


def pair(prompt="Which color has the sky?", chosen="It is blue", rejected="A shade of green"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(prompt=None, chosen=None, rejected=None):
    return {
        "prompt": [user("Which color has the sky?")] if prompt is None else prompt,
        "chosen": [assistant("It is blue")] if chosen is None else chosen,
        "rejected": [assistant("A shade of green")] if rejected is None else rejected,
    }


def stream(rows):
    """Rows as they are: a Dataset would give messages the union of their keys, and refuse what is no Unicode."""
    return IterableDataset.from_generator(lambda: iter(rows))


def found(row, tokenizer=None, **options):
    """Returns the findings in a dataset of this row: codes to details."""
    report = validate(stream([row]), tokenizer, **options)
    return {finding.kind.code: finding.detail for finding in report.findings if finding.kind.code not in FACTS}


@pytest.mark.parametrize(
    "row",
    [
        pair(),
        pair(prompt="Quelle heure est-il ?", chosen=" Il est midi\n\tdéjà", rejected="It is noon 👩‍🚀"),
        {"chosen": "Human: hi\n\nAssistant: hello", "rejected": "Human: hi\n\nAssistant: go away"},
        chat(),
        chat(prompt=[message("system", "Be short."), user("Hi")]),
        chat(prompt=[user("Hi"), assistant("Hello"), user("Bye")]),
        chat(
            chosen=[message("assistant", "", tool_calls=[{"name": "f"}]), message("tool", "42"), assistant("It is 42")]
        ),
        chat(chosen=[message("assistant", "", tool_calls=[{"name": "f"}])]),
        chat(chosen=[assistant("Which color has the sky? Blue")], rejected=[assistant("Which color has the sky? No")]),
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"prompt": "What?", "completion": " That.", "label": True},
        {"prompt": [user("What?")], "completion": [assistant("That.")], "label": False},
    ],
)
def test_nothing_is_found_in_good_rows(row):
    assert found(row).keys() <= {"one_label"}
    assert found(row, build_tokenizer(), max_length=200).keys() <= {"one_label", "tokens_merge"}


@pytest.mark.parametrize(
    "row, code, detail",
    [
        (pair(chosen="x y", rejected="x y"), "identical_pair", "'x y'"),
        (chat(rejected=[assistant("It is blue")]), "identical_pair", "'It is blue'"),
        (pair(chosen="It is Blue.", rejected="it is  blue"), "near_identical_pair", "case, spacing"),
        (
            pair(chosen=SENTENCE, rejected=SENTENCE.replace("moons", "rings")),
            "near_identical_pair",
            "95% of their words",
        ),
        (
            {"chosen": f"Q: a\nA: {SENTENCE}", "rejected": f"Q: a\nA: {SENTENCE.replace('moons', 'rings')}"},
            "near_identical_pair",
            "of their words",
        ),
        (pair(chosen=""), "empty_response", "chosen"),
        (pair(rejected=" \n"), "empty_response", "rejected"),
        (chat(chosen=[]), "empty_response", "chosen"),
        (chat(rejected=[assistant(None)]), "empty_response", "rejected"),
        ({"prompt": "a", "completion": "", "label": True}, "empty_response", "completion"),
        (pair(prompt=" "), "empty_prompt", ""),
        ({"chosen": "yes", "rejected": "no"}, "empty_prompt", ""),
        (
            pair(prompt="Who are you?", chosen="Who are you? I", rejected="Who are you? We"),
            "prompt_in_response",
            "'Who are you?'",
        ),
        (pair(chosen="Это синий цвет"), "scripts_differ", "Cyrillic / Latin"),
        (pair(chosen="空は青いです", rejected="天空是蓝色的"), "scripts_differ", "Japanese / Han"),
        (pair(chosen="a\0b"), "nul_characters", "chosen: U+0000"),
        (pair(prompt="a\x1bb"), "control_characters", "prompt: U+001B"),
        (pair(rejected="caf\ufffd"), "replacement_characters", "rejected: U+FFFD"),
        (pair(chosen="a\ud800b"), "lone_surrogates", "chosen: U+D800"),
        (pair(chosen="\ue000 and more"), "private_use_characters", "chosen: U+E000"),
        (chat(prompt=[message("human", "Hi")]), "unknown_role", "prompt: 'human'"),
        (chat(prompt=[user("a"), user("b")]), "roles_not_alternating", "prompt: user after user"),
        (chat(prompt=[user("a"), message("system", "b"), user("c")]), "roles_not_alternating", "system"),
        (chat(prompt=[assistant("a"), user("b")]), "roles_not_alternating", "assistant after nothing"),
        (chat(chosen=[assistant("a"), assistant("b")]), "roles_not_alternating", "chosen: assistant"),
        (chat(prompt=[user("a"), assistant("b")]), "prompt_ends_wrong", "it ends with assistant"),
        (chat(prompt=[message("system", "a")]), "prompt_ends_wrong", "system"),
        (chat(chosen=[user("a"), assistant("b")]), "response_starts_wrong", "chosen starts with user"),
        (chat(prompt=[]), "no_prompt", ""),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "no_prompt", ""),
        (chat(prompt=[message("system", ""), user("a")]), "empty_message", "prompt: system"),
    ],
)
def test_each_defect_is_found(row, code, detail):
    findings = found(row)
    assert detail in findings[code]
    assert findings.keys() - {"one_label"} == {code}


def test_what_two_texts_share_decides_over_what_differs():
    """One word of twenty is near-identical, one of five is not: short answers differ in little, and may have to."""
    assert not found(pair(chosen="The answer is clearly 42", rejected="The answer is clearly 43"))
    words = SENTENCE.split()
    assert word_similarity(words, words, NEAR_IDENTICAL_SHARE) == 1
    assert word_similarity(words, words[:-1], 0.5) == pytest.approx(2 * (len(words) - 1) / (2 * len(words) - 1))
    assert word_similarity(["a"], ["b"], 0.5) == 0
    assert word_similarity(["a", "b", "c", "d"], ["d", "c", "b", "a"], 0.5) == pytest.approx(2 / 8)


def test_similarity_of_long_texts_has_a_bounded_cost():
    """Twenty thousand words in another order: aligned word by word, they would take minutes."""
    words = random.Random(0).choices(["so", "it", "is"], k=20_000)
    start = time.process_time()
    word_similarity(words, words[1:] + ["so"], NEAR_IDENTICAL_SHARE)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text, script",
    [
        ("Hello", "Latin"),
        ("ＨＥＬＬＯ", "Latin"),
        ("Привет", "Cyrillic"),
        ("مرحبا", "Arabic"),
        ("नमस्ते दुनिया", "Devanagari"),
        ("안녕하세요", "Hangul"),
        ("你好世界", "Han"),
        ("こんにちは世界", "Japanese"),
        ("abcd абвг", "mixed"),
        ("12 + 30 = 42", None),
        ("abc", None),
    ],
)
def test_scripts(text, script):
    assert main_script(Counter(text)) == script


@pytest.mark.parametrize(
    "row, code, detail, tokenizer, max_length",
    [
        (pair(), "truncated_response", "rejected: ", build_tokenizer(), 15),
        (pair(prompt="a b c d e f g h i j k"), "prompt_fills_max_length", "tokens", build_tokenizer(), 8),
        (
            chat(chosen=[assistant("so so so A")], rejected=[assistant("so so so B")]),
            "identical_after_truncation",
            "tokens are left",
            build_tokenizer(),
            22,
        ),
        (pair(prompt=f"{BOS}Which color?"), "double_bos", "", build_tokenizer(add_bos=True), None),
        (pair(prompt=f"{BOS}Which color?"), "special_tokens_in_text", BOS, build_tokenizer(), None),
        (
            chat(chosen=[assistant(f"blue{EOS}")]),
            "special_tokens_in_messages",
            f"chosen: {EOS}",
            build_tokenizer(),
            None,
        ),
        (
            chat() | {"chat_template_kwargs": {"thinking": False}},
            "prompt_changes_with_response",
            "<think>",
            build_tokenizer(),
            None,
        ),
        (pair(prompt="The sk", chosen="y is blue"), "tokens_merge", "", build_tokenizer(), None),
    ],
)
def test_each_defect_that_a_tokenizer_shows(row, code, detail, tokenizer, max_length):
    findings = found(row, tokenizer, max_length=max_length)
    assert detail in findings[code]


def test_the_eos_token_may_end_text():
    assert "special_tokens_in_text" not in found(pair(chosen=f"It is blue{EOS}\n"), build_tokenizer())


def test_a_row_that_the_template_refuses_does_not_spoil_the_others():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'No' %}{{ raise_exception('I will not') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [chat(prompt=[message("user", "No" if row == 2 else f"Question {row}")]) for row in range(5)]
    report = validate(stream(rows), tokenizer)
    (finding,) = (finding for finding in report.findings if finding.severity == "error")
    assert finding.kind.code == "not_tokenizable" and finding.row_numbers == [2]
    assert "I will not" in finding.detail
    assert len(report.tables[0].known_lengths("chosen")) == 4


def test_messages_without_a_chat_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    assert "no_chat_template" in found(chat(), tokenizer)
    assert "no_chat_template" not in found(pair(), tokenizer)


@pytest.mark.parametrize("make", [pair, chat])
@pytest.mark.parametrize("add_bos", [False, True])
def test_lengths_are_those_of_training(make, add_bos):
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(SENTENCE.split(), k=rng.randint(1, 9))) for _ in range(3)] for _ in range(12)]
    if make is chat:
        roles = ("user", "assistant", "assistant")
        texts = [[[message(role, text)] for role, text in zip(roles, row, strict=True)] for row in texts]
    rows = [make(*row) for row in texts] + [make()]
    if make is pair:
        rows = [{key: row["prompt"] + "\n" + row[key] for key in ("chosen", "rejected")} for row in rows]
    tokenizer = build_tokenizer(add_bos=add_bos)
    prepared = prepare_preference_dataset(Dataset.from_list(rows), tokenizer)
    table = validate(Dataset.from_list(rows), tokenizer).tables[0]
    for column in ("prompt", "chosen", "rejected"):
        assert table.lengths(column).tolist() == [len(ids) for ids in prepared[f"{column}_ids"]]
