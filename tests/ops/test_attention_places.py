"""The bits of a tree's attention and gradients: the same wherever it lies in a row, and whatever else is there."""

from __future__ import annotations

import pytest
import torch

from support.attention_op import draw, ours
from support.instruction_sets import CPU_FLAGS, TILE_FLAGS, check_instruction_set
from trl_fast.data.segments import num_tokens, segments_of

# Those whose kernels differ in more than how numbers are read: bfloat16 may have tiles.
KINDS = (torch.float32, torch.bfloat16)
# Heads, key heads, width of keys and of values.
HEADS = [(9, 3, 64, 64), (2, 2, 20, 12), (7, 1, 5, 3)]
TREES = {
    "a sequence": (150,),
    "one token": (1,),
    "branches": (70, 33, 129, 1, 40),
    "nested": (13, (66, 3, 70), (2, (5, 64, 1), 9)),
}
# What stands before and behind a tree.
NEIGHBOURS = [
    (((1,),), ()),
    ((), ((3,), (77, 5, 91))),
    (((61, 13, 8), (129,)), ((63,), (200, 1))),
    (((7,), (5,), (64,), (2, 1)), ((31, 32, 33),)),
]
# Of one tree; a run of it moves with it.
MASKS = {
    "causal": {},
    "a window": {"window": 37},
    "runs and a window": {"runs": ((2, 9), (9, 13)), "window": 5, "whole_runs": True},
}
NAMES = ("out", "lse", "dq", "dk", "dv")


def tokens_of(trees):
    return sum(map(num_tokens, trees))


def beside(given, before, behind):
    """Query, key, value and gradient of a tree, (heads, T, D) each, with other numbers before and behind them."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for x in given:
        others = [torch.randn(len(x), n, x.shape[2], generator=generator).to(x.dtype) for n in (before, behind)]
        parts.append(torch.cat([others[0], x, others[1]], dim=1))
    return parts


def check_places(heads, tree, mask, dtype=torch.float32, softcap=0.0):
    tokens = num_tokens(tree)
    given = draw(*heads, tokens, dtype)
    fits = {**mask, "runs": tuple(run for run in mask.get("runs", ()) if run[1] <= segments_of((tree,))[0].end)}
    alone = ours(given, (tree,), fits, 0.2, softcap, "cpp")
    for before, behind in NEIGHBOURS:
        first = tokens_of(before)
        moved = {**fits, "runs": tuple((a + first, b + first) for a, b in fits["runs"])}
        row = beside(given, first, tokens_of(behind))
        found = ours(row, (*before, tree, *behind), moved, 0.2, softcap, "cpp")
        for name, got, expected in zip(NAMES, found, alone, strict=True):
            assert torch.equal(got[:, first : first + tokens], expected), (name, before, behind)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_tree_has_its_bits_in_every_place(tree, heads, dtype):
    for mask in MASKS.values():
        check_places(heads, tree, mask, dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("window", [None, 300])
def test_a_long_tree_whose_blocks_are_taken_together(window, dtype):
    check_places((2, 1, 8, 8), (1100, 40), {"window": window}, dtype)


def test_with_a_cap_and_in_float16():
    for dtype in KINDS:
        check_places(HEADS[0], TREES["branches"], {}, dtype, softcap=1.5)
    check_places(HEADS[0], TREES["branches"], {}, torch.float16)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_sequence_has_its_bits_beside_other_branches(dtype):
    """Output and log-sum-exp of a prompt and of a branch do not depend on the prompt's other branches."""
    prompt, branches = 75, (33, 130, 7)
    given = draw(6, 2, 32, 32, prompt + sum(branches), dtype)
    segments = segments_of(((prompt, *branches),))
    row = ours(given, ((prompt, *branches),), {}, 0.2, 0.0, "cpp")
    for branch in segments[1:]:
        of_sequence = [*range(prompt), *range(branch.start, branch.end)]
        alone = ours([x[:, of_sequence] for x in given], ((prompt, branch.length),), {}, 0.2, 0.0, "cpp")
        for got, expected in zip(row[:2], alone[:2], strict=True):
            assert torch.equal(got[:, of_sequence], expected)
        # The branch's own gradients are its own matter, too.
        for got, expected in zip(row[2:], alone[2:], strict=True):
            assert torch.equal(got[:, branch.start : branch.end], expected[:, prompt:])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", range(4), ids=["query", "key", "value", "grad"])
def test_what_is_no_number_stays_in_its_tree(tensor, wrong, dtype):
    """Tiles of 8 or 32 rows hold tokens of one segment alone: nothing is multiplied by a neighbour's NaN."""
    trees = ((5, 3, 4), (1,), (7,), (66, 9), (1, 1), (3,))
    given = draw(3, 1, 16, 16, tokens_of(trees), dtype)
    clean = ours(given, trees, {}, 0.2, 0.0, "cpp")
    start = 0
    for tree in trees:
        tokens = slice(start, start + num_tokens(tree))
        start = tokens.stop
        broken = [x.clone() for x in given]
        broken[tensor][:, tokens] = wrong
        found = ours(broken, trees, {}, 0.2, 0.0, "cpp")
        assert not all(x[:, tokens].isfinite().all() for x in found)
        for name, got, expected in zip(NAMES, found, clean, strict=True):
            got, expected = got.clone(), expected.clone()
            got[:, tokens] = expected[:, tokens] = 0
            assert torch.equal(got, expected), (name, tree)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_what_is_no_number_stays_in_its_branch(dtype):
    """A branch's output and its own gradients do not depend on another branch's NaN; the prompt's gradients do."""
    trees = ((10, 3, 3, 3),)
    given = draw(3, 1, 16, 16, 19, dtype)
    clean = ours(given, trees, {}, 0.2, 0.0, "cpp")
    for x in given:
        x[:, 13:16] = float("nan")
    found = ours(given, trees, {}, 0.2, 0.0, "cpp")
    for got, expected in zip(found, clean, strict=True):
        assert torch.equal(got[:, 16:], expected[:, 16:]) and torch.equal(got[:, 10:13], expected[:, 10:13])
    assert all(torch.equal(got[:, :10], expected[:, :10]) for got, expected in zip(found[:3], clean[:3], strict=True))
    assert found[3][:, :10].isnan().all() and found[4][:, :10].isnan().all()


def check_all_kernels():
    for dtype in KINDS:
        for heads in HEADS:
            for tree in TREES.values():
                check_places(heads, tree, {}, dtype)
        for tensor in range(4):
            test_what_is_no_number_stays_in_its_tree(tensor, float("nan"), dtype)
        test_what_is_no_number_stays_in_its_branch(dtype)


@pytest.mark.parametrize("isa", CPU_FLAGS | TILE_FLAGS)
def test_every_instruction_set(isa):
    check_instruction_set(isa, check_all_kernels, tested_here=True)
