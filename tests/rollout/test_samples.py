"""Samples of the online methods: which completions stand next to each other, and what their batch shares."""

import torch

from trl_fast.data.segments import num_tokens
from trl_fast.rollout.samples import Samples

SYSTEM = list(range(100, 120))
CALL = list(range(200, 218))
PROMPTS = [[*SYSTEM, 1, 2], [*SYSTEM, 3]]
# Two completions of the first prompt call the same tool, and go on in their own ways.
SAMPLES = Samples.of(
    [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]],
    [[*CALL, 5, 6], [8, 9], [7], [*CALL, 6]],
)


def test_what_begins_alike_stands_side_by_side_whatever_the_order_was():
    assert SAMPLES.by_beginning(range(4)) == SAMPLES.by_beginning([3, 1, 0, 2]) == [2, 0, 3, 1]
    assert SAMPLES.by_beginning([3, 1]) == [3, 1]


def test_a_batch_shares_system_messages_and_first_turns():
    samples = SAMPLES.select([2, 0, 3, 1])
    batch = samples.batch("shared_prefix", 0)
    # The prompts differ in fewer tokens than are worth sharing.
    assert batch.tree_lengths == ((20, 3, (20, 2, 1), 3),)
    assert num_tokens(batch.tree_lengths[0]) == 49 and batch.num_tokens == 23 + 42 + 41 + 23
    assert batch.group_sizes == (1 + 20 + 19, 2)
    padded = samples.batch("padded", 0)
    for name in ("targets", "branch", "offset", "branch_lengths"):
        assert torch.equal(batch[name], padded[name]), name
