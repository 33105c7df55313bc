"""Segments of a row of trees: where each stands, and which sequences they make."""

from trl_fast.data.segments import Segment, num_tokens, segments_of, sequence_counts, sequence_lengths, sequences_of

NESTED = (10, 4, (5, 3, (0, 2, 1)), 0)


def test_segments_stand_in_the_order_of_the_row():
    found = segments_of(((3,), NESTED))
    places = [(segment.start, segment.end, segment.tree_end) for segment in found]
    assert places == [
        *((0, 3, 3), (3, 13, 28), (13, 17, 17), (17, 22, 28)),
        *((22, 25, 25), (25, 25, 28), (25, 27, 27), (27, 28, 28), (28, 28, 28)),
    ]
    assert [segment.parent for segment in found] == [None, None, 1, 1, 3, 3, 5, 5, 1]
    assert [segment.offset for segment in found] == [0, 0, 10, 10, 15, 15, 15, 15, 10]
    assert [segment.depth for segment in found] == [0, 0, 1, 1, 2, 2, 3, 3, 1]
    assert [segment.is_continued for segment in found] == [False, True, False, True, False, True, False, False, False]


def test_sequences_end_where_nothing_continues():
    assert sequences_of(((3,), NESTED)) == ((0,), (1, 2), (1, 3, 4), (1, 3, 5, 6), (1, 3, 5, 7), (1, 8))


def test_a_prompt_with_completions_and_a_sequence_alone():
    assert segments_of(((2, 1),)) == (Segment(0, 2, 3, 0, None, 0), Segment(2, 3, 3, 2, 0, 1))
    assert (num_tokens(NESTED), num_tokens(4), num_tokens((0,))) == (25, 4, 0)
    assert segments_of(()) == () == sequences_of(())


def test_lengths_of_sequences_and_how_many_go_through_a_segment():
    assert sequence_lengths(((3,), NESTED)) == (3, 14, 18, 17, 16, 10)
    assert sequence_counts(((3,), NESTED)) == (1, 5, 1, 3, 1, 2, 1, 1, 1)
    assert sequence_lengths(()) == () == sequence_counts(())
