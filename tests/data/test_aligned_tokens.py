"""Spans of two tokenizers' tokens, and the rows of both models that make them."""

import pytest
import torch

from trl_fast.data.aligned_tokens import Completion, aligned_spans, shared_tokens, span_rows, spans_of


def shown(spans):
    return [([*own], [*others]) for own, others in spans]


@pytest.mark.parametrize(
    "own, others, expected",
    [
        ([1, 2, 3], [1, 2, 3], [([0], [0]), ([1], [1]), ([2], [2])]),
        ([3], [1, 2, 3], [([0], [0, 1, 2])]),
        ([1, 3, 6], [2, 3, 4, 6], [([0, 1], [0, 1]), ([2], [2, 3])]),
        # The end of one: what is left is a span, unless one side has nothing left.
        ([1, 2], [1, 5], [([0], [0]), ([1], [1])]),
        ([1], [1, 2], [([0], [0])]),
        # End tokens have no bytes.
        ([2, 2], [1, 2, 2], [([0], [0, 1]), ([1], [2])]),
        ([], [1], []),
    ],
)
def test_spans_end_where_both_end_a_token(own, others, expected):
    assert shown(aligned_spans(own, others)) == expected
    assert shown(aligned_spans(others, own)) == [(second, first) for first, second in expected]


def test_what_is_left_out_and_tokens_by_position():
    student, teacher = Completion([7, 8, 9], 2, [1, 2, 3]), Completion([5, 6, 4], 3, [2, 3, 4])
    assert shown(spans_of(student, teacher, by_text=True)) == [([0, 1], [0])]
    assert shown(spans_of(student, teacher, by_text=False)) == [([0], [0]), ([1], [1])]
    assert spans_of(student._replace(compared=-1), teacher, by_text=True) == []


@pytest.mark.parametrize(
    "after, bases, others",
    [(False, [1, 2, 4], [0, 3]), (True, [1, 3, 5], [2, 6])],
)
def test_rows_of_spans(after, bases, others):
    """Two completions of three and two tokens, with a row more each where the rows behind tokens count."""
    groups = [[range(0, 2), range(2, 3)], [range(0, 2)]]
    lengths = [4, 3] if after else [3, 2]
    rows = span_rows([[10, 11, 12], [13, 14]], groups, lengths=lengths, after=after)
    assert rows.bases.tolist() == bases and rows.others.tolist() == others
    assert rows.tokens.tolist() == ([11, 14] if after else [10, 13]) and rows.spans.tolist() == [0, 2]


def test_tokens_of_both_vocabularies():
    student, teacher = {"a": 0, "b": 1, "c": 2, "d": 9}, {"c": 5, "a": 3, "x": 1, "d": 0}
    own, others = shared_tokens(student, teacher, (4, 6))
    assert own.tolist() == [0, 2] and others.tolist() == [3, 5]
    none = shared_tokens({"a": 0}, {"b": 0}, (1, 1))
    assert [len(each) for each in none] == [0, 0] and none[0].dtype == torch.int64
