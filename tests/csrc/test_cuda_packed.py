"""Tests the CUDA row kernels of packed logits, compiled as host C++."""

import pytest
import torch

from support.packed_rows import (
    COLUMNS,
    EVERYTHING,
    PLAIN,
    TRANSFORMED,
    check_empty,
    check_packing,
    hard_rows,
    pack_hard_rows,
    same_bits,
)
from trl_fast.ops.head.row_statistics import ENTROPY
from trl_fast.ops.head.sweep import new_state

pytestmark = pytest.mark.gpu_code


@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_packing(kernels, columns, transform):
    check_packing(kernels, columns, transform)


@pytest.mark.parametrize("misplaced", [1, 4, 8])
def test_packing_wherever_the_rows_lie(kernels, misplaced):
    """Logits, words and gradients at other boundaries than those of sixteen bytes, or of some of them."""
    check_packing(kernels, 2056, TRANSFORMED, misplaced=misplaced)


def test_scores_alone_and_with_some_outputs(kernels):
    for outputs in (0, ENTROPY):
        pack_hard_rows(kernels, 2056, TRANSFORMED, outputs=outputs)


def test_empty_tiles(kernels):
    check_empty(kernels)


@pytest.mark.parametrize("columns", [40, 2056, 4099])
def test_the_same_logits_give_the_same_bits_wherever_they_lie(kernels, columns):
    """Rows of a batch lie where its other rows put them; a rate of 1 between two policies must not depend on it."""
    logits, targets = hard_rows(columns)
    states = []
    for stride, misplaced in ((columns + 8 - columns % 8, 0), (columns + 8, 0), (columns + 8, 1), (columns + 9, 3)):
        room = torch.empty(len(logits), stride)[:, misplaced : misplaced + columns]
        state = new_state(len(logits), logits.device)
        kernels.scores(room.copy_(logits), targets, None, 1.0, 0.0, 1.0, EVERYTHING, 0, state)
        states.append(state)
    assert all(same_bits(state, states[0]) for state in states)
