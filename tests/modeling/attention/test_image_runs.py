"""Tokens of images that see each other both ways, in rows of trees: every kind of kernel against a dense mask."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.heads import error
from support.row_attention import VarlenOnTheCpu, dense, problem, random_runs, random_tree
from trl_fast.data.segments import num_tokens
from trl_fast.modeling.attention import plain
from trl_fast.modeling.attention import tree_attention as op
from trl_fast.modeling.attention.cpu import CompiledRowAttention, CpuRowAttention
from trl_fast.modeling.attention.parts import longest_sequence
from trl_fast.modeling.attention.tree_attention import tree_attention
from trl_fast.ops.device import simulated_device
from trl_fast.planning.device_facts import planned_facts


def random_rows(number):
    """Trees, runs, a window and whether it holds within runs, and numbers of heads."""
    choice = random.Random(0)
    while number:
        trees = tuple(random_tree(choice) for _ in range(choice.randrange(1, 4)))
        runs = random_runs(choice, trees)
        if runs and sum(map(num_tokens, trees)) < 400:
            number -= 1
            window = choice.choice([None, choice.randrange(1, longest_sequence(trees) + 2)])
            mask = {"window": window, "runs": runs, "whole_runs": choice.random() < 0.4}
            yield trees, mask, choice.choice([(4, 4), (4, 2), (3, 1)])


def compare(trees, mask, heads, groups, dtype, tolerance, softcap=None, with_sinks=True, seed=0):
    query, key, value, upstream = problem(trees, heads, groups, dtype, seed=seed)
    sinks = torch.linspace(-2, 3, heads, dtype=dtype, requires_grad=True) if with_sinks else None
    leaves = [x for x in (query, key, value, sinks) if x is not None]
    runs = {"image_runs": mask["runs"], "whole_runs": mask["whole_runs"]}
    got = tree_attention(query, key, value, trees, None, softcap, mask["window"], sinks, **runs)
    exact, exact_leaves = dense(query, key, value, trees, torch.float64, softcap=softcap, sinks=sinks, **mask)
    grads = torch.autograd.grad(got, leaves, upstream)
    exact_grads = torch.autograd.grad(exact, exact_leaves, upstream.double())
    for a, b in zip((got, *grads), (exact, *exact_grads), strict=True):
        assert a.dtype == dtype and a.shape == b.shape and error(a, b) <= tolerance


@pytest.mark.parametrize("kernels", [CpuRowAttention, plain.PlainRowAttention], ids=lambda kernels: kernels.__name__)
def test_random_rows_to_the_last_digits(kernels, monkeypatch):
    """Nested trees, several runs and adjacent ones, windows shorter and longer than runs, sinks; in float64."""
    monkeypatch.setattr(op, "KERNELS", (kernels,))
    monkeypatch.setattr(plain, "_TILE_BYTES", 1 << 14)
    for number, (trees, mask, (heads, groups)) in enumerate(random_rows(40)):
        softcap = 1.5 if number % 2 and kernels is plain.PlainRowAttention else None
        compare(trees, mask, heads, groups, torch.float64, 1e-13, softcap, number % 3 > 0, seed=number)


def test_random_rows_on_the_compiled_kernels(monkeypatch):
    monkeypatch.setattr(op, "KERNELS", (CompiledRowAttention,))
    for number, (trees, mask, (heads, groups)) in enumerate(random_rows(40)):
        softcap = 1.5 if number % 2 else None
        compare(trees, mask, heads, groups, torch.float32, 4e-6, softcap, number % 3 > 0, seed=number)


def test_16_bits():
    for trees, mask, (heads, groups) in random_rows(6):
        compare(trees, mask, heads, groups, torch.bfloat16, 2e-2)


def test_what_the_varlen_kernels_are_told(monkeypatch):
    """CUDA's path with stand-ins for its two kernels: one more causal call for all runs of a row."""
    stand_in = VarlenOnTheCpu(monkeypatch)
    for trees, mask, (heads, groups) in random_rows(25):
        compare(trees, mask, heads, groups, torch.float32, 4e-6)
    stand_in.calls.clear()
    mask = {"window": None, "runs": ((2, 30), (30, 38), (60, 61), (66, 76)), "whole_runs": False}
    compare(((40, 17, 9), (20, 5)), mask, 4, 2, torch.float32, 3e-6)
    # Segments; the runs of more than one token; what continues the two prompts.
    assert stand_in.calls[:3] == [(40, 40, True, None), (27, 27, True, None), (26, 40, False, None)]


@pytest.mark.parametrize("runs", [((3, 9),), ((5, 12),), ((0, 4), (3, 5)), ((2, 4), (0, 1)), ((13, 15),), ((2, 2),)])
def test_a_run_lies_within_a_segment_behind_the_run_before_it(runs):
    query, key, value, _ = problem(((6, 4, 4),))
    with pytest.raises(ValueError, match="image_runs: tokens .* do not lie within one segment of the row"):
        tree_attention(query, key, value, ((6, 4, 4),), image_runs=runs)


def test_fake_tensors_on_a_simulated_gpu():
    """Shapes and dtypes of the varlen kernels with runs, as a plan runs them."""
    trees = ((50, (20, 30, 4), 60), (9, 3))
    with FakeTensorMode(), simulated_device(planned_facts("gpu")):
        query, key, value, upstream = problem(trees, dtype=torch.bfloat16)
        out = tree_attention(query, key, value, trees, window=16, image_runs=((4, 40), (164, 172)), whole_runs=True)
        leaves = (query, key, value)
        for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, upstream), strict=True):
            assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    assert out.shape == upstream.shape and out.dtype == torch.bfloat16
