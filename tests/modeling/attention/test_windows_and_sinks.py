"""Sliding windows and attention sinks in rows of trees against a dense mask, on every kind of kernel."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.heads import error
from support.row_attention import TREES, VarlenOnTheCpu, dense, problem, random_tree
from trl_fast.data.segments import num_tokens
from trl_fast.modeling.attention import plain
from trl_fast.modeling.attention import tree_attention as op
from trl_fast.modeling.attention.cpu import CompiledRowAttention, CpuRowAttention
from trl_fast.modeling.attention.parts import attention_parts, longest_sequence
from trl_fast.modeling.attention.row_attention import RowMask
from trl_fast.modeling.attention.tree_attention import attention_spec, tree_attention
from trl_fast.ops.device import simulated_device
from trl_fast.planning.device_facts import planned_facts

# A window's edge before, at, and behind a prompt's end; longer and shorter than branches; some trees shorter.
WINDOWED = {
    **TREES,
    "one long sequence": ((300,),),
    "long branches": ((70, 150, 3, 90), (20, 4)),
    "prompt of the window, and one token less": ((33, 40), (32, 40), (34, 5)),
    "nested, long": ((40, (30, 20, (50, 9, 0)), (0, 70, 3)), (2, 1), (60,)),
}
WINDOWS = [1, 2, 7, 33, 140]


def random_rows(number):
    choice = random.Random(0)
    while number:
        trees = tuple(random_tree(choice) for _ in range(choice.randrange(1, 4)))
        if 0 < sum(map(num_tokens, trees)) < 600:
            number -= 1
            yield trees, choice.randrange(1, longest_sequence(trees) + 2), choice.choice([(4, 4), (4, 2), (3, 1)])


def compare(trees, window, heads, groups, dtype, tolerance, softcap=None, with_sinks=True, seed=0):
    query, key, value, upstream = problem(trees, heads, groups, dtype, seed=seed)
    sinks = torch.linspace(-2, 3, heads, dtype=dtype, requires_grad=True) if with_sinks else None
    leaves = [x for x in (query, key, value, sinks) if x is not None]
    got = tree_attention(query, key, value, trees, None, softcap, window, sinks)
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    exact, exact_leaves = dense(query, key, value, trees, torch.float64, **options)
    baseline, narrow = dense(query, key, value, trees, dtype, **options)
    grads = torch.autograd.grad(got, leaves, upstream)
    exact_grads = torch.autograd.grad(exact, exact_leaves, upstream.double())
    baseline_grads = torch.autograd.grad(baseline, narrow, upstream)
    for a, b, c in zip((got, *grads), (baseline, *baseline_grads), (exact, *exact_grads), strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert error(a, c) <= max(2 * error(b, c), tolerance)


@pytest.mark.parametrize("kernels", [CpuRowAttention, plain.PlainRowAttention], ids=lambda kernels: kernels.__name__)
def test_random_rows_to_the_last_digits(kernels, monkeypatch):
    """Trees of up to four levels, in float64."""
    monkeypatch.setattr(op, "KERNELS", (kernels,))
    monkeypatch.setattr(plain, "_TILE_BYTES", 1 << 14)
    for number, (trees, window, (heads, groups)) in enumerate(random_rows(60)):
        softcap = 1.5 if number % 2 and kernels is plain.PlainRowAttention else None
        compare(trees, window, heads, groups, torch.float64, 1e-13, softcap, number % 3 > 0, seed=number)


def test_random_rows_on_the_compiled_kernels(monkeypatch):
    monkeypatch.setattr(op, "KERNELS", (CompiledRowAttention,))
    for number, (trees, window, (heads, groups)) in enumerate(random_rows(40)):
        softcap = 1.5 if number % 2 else None
        compare(trees, window, heads, groups, torch.float32, 2e-6, softcap, number % 3 > 0, seed=number)


# Where a query sees few keys, the gradients of its scores are differences of numbers that 16 bits round to be alike.
FLOORS = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("trees", WINDOWED.values(), ids=WINDOWED)
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_16_bits(trees, dtype):
    compare(trees, 33, 4, 2, dtype, FLOORS[dtype])
    compare(trees, 7, 4, 1, dtype, FLOORS[dtype], softcap=1.5, with_sinks=False)
    compare(trees, 1, 4, 4, dtype, FLOORS[dtype])


@pytest.mark.parametrize("trees", WINDOWED.values(), ids=WINDOWED)
def test_what_the_varlen_kernels_are_told(trees, monkeypatch):
    """CUDA's path with stand-ins for its two kernels: one causal call, whatever the number of segments."""
    stand_in = VarlenOnTheCpu(monkeypatch)
    for window in WINDOWS:
        compare(trees, window, 4, 2, torch.float32, 3e-6)
        told = [left for *_, left in stand_in.calls]
        groups = attention_parts(RowMask(trees, window))
        # Trees of the row that the window holds go the plain way, a call a depth.
        assert len(told) == 2 * len(groups)
        assert told.count(window - 1) == (2 if any(part.window for part in groups[0]) else 0)
        stand_in.calls.clear()


def test_a_row_without_short_trees_is_one_call(monkeypatch):
    stand_in = VarlenOnTheCpu(monkeypatch)
    compare(((50, (20, 30, 4), 60), (90,)), 16, 4, 2, torch.float32, 3e-6)
    assert stand_in.calls == [(90, 90, True, 15)] * 2


@pytest.mark.parametrize("window, tokens", [(128, 8192)])
def test_memory_is_linear_in_the_rows_length(window, tokens):
    from benchmarks.memory import measure_peak

    def peak(tokens):
        query, key, value, upstream = problem(((tokens // 2, tokens // 4, tokens // 4),), 2, 1, width=8)
        trees = ((tokens // 2, tokens // 4, tokens // 4),)

        def step():
            out = tree_attention(query, key, value, trees, window=window)
            torch.autograd.grad(out, (query, key, value), upstream)

        step()
        return measure_peak(step).peak_bytes

    long, short = peak(tokens), peak(tokens // 4)
    # Four times the tokens; a mask of bytes for one head would be 64 MiB.
    assert long < 5 * short and long < 8 << 20


def test_a_window_shorter_than_a_token_is_refused():
    query, key, value, _ = problem(((5,),))
    with pytest.raises(ValueError, match="window: 0 tokens; a token attends at least to itself"):
        tree_attention(query, key, value, ((5,),), window=0)


def test_a_window_that_holds_every_sequence_is_none():
    query = torch.empty(1, 2, 30, 16)
    assert attention_spec(query, RowMask(((10, 5, (5, 10)),), 25)).mask.window is None
    assert attention_spec(query, RowMask(((10, 5, (5, 10)),), 24)).mask.window == 24


def test_fake_tensors_on_a_simulated_gpu():
    """Shapes and dtypes of the varlen kernels with gathered keys, and of sinks, as a plan runs them."""
    trees = ((50, (20, 30, 4), 60), (9, 3))
    with FakeTensorMode(), simulated_device(planned_facts("gpu")):
        query, key, value, upstream = problem(trees, dtype=torch.bfloat16)
        sinks = torch.zeros(4, requires_grad=True)
        out = tree_attention(query, key, value, trees, window=16, sinks=sinks)
        leaves = (query, key, value, sinks)
        for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, upstream), strict=True):
            assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    assert out.shape == upstream.shape and out.dtype == torch.bfloat16
