"""The online demos' task: splits, score and preference pairs."""

import pytest
from transformers import AutoTokenizer

from examples.arithmetic_task import answer_pairs, correct, sums
from examples.smollm2 import smollm2_folder


def answers(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_no_question_is_in_both_splits_and_the_seed_decides():
    data = sums(30, 10, seed=1)
    questions = {name: {row["prompt"][-1]["content"] for row in part} for name, part in data.items()}
    assert (len(questions["train"]), len(questions["test"])) == (30, 10)
    assert not questions["train"] & questions["test"]
    assert sums(30, 10, seed=1)["train"][:] == data["train"][:]
    assert sums(30, 10, seed=2)["train"][:] != data["train"][:]


def test_too_many_questions_are_refused():
    with pytest.raises(ValueError, match=r"has 200 questions, 190 \+ 24 were asked for"):
        sums(190, 24, seed=0)


def test_only_the_right_answer_alone_is_correct():
    assert correct(answers(["7", " 7\n", "8", "7.", "It is 7", ""]), ["7"] * 6) == [1, 1, 0, 0, 0, 0]


def test_pairs_are_a_right_and_a_wrong_answer_to_the_same_question():
    data = sums(20, 5, seed=0)["train"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    pairs = answer_pairs(data, tokenizer, count=6, seed=0)
    assert len(pairs) == 20 * 6
    right = {row["prompt"][-1]["content"]: row["answer"] for row in data}
    for pair in pairs:
        (question,) = [question for question in right if question in pair["prompt"]]
        assert pair["chosen"] == right[question]
        assert correct(answers([pair["rejected"]]), [right[question]]) == [0]
        assert pair["prompt"].endswith("<|im_start|>assistant\n")
    rejected = {(pair["prompt"], pair["rejected"]) for pair in pairs}
    assert len(rejected) == len(pairs)
