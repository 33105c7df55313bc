"""Attention by varlen flash kernels with its backward pass in C++: the bits of Python's, by the same calls.

The kernels and the merge are stand-ins, registered with torch's dispatcher for the CPU; on a GPU, benchmarks.gpu_kit
runs the real ones.
"""

import random

import pytest
import torch

from support.row_attention import TREES, VarlenOnTheCpu, problem, random_runs, random_tree
from trl_fast.modeling.attention import varlen
from trl_fast.modeling.attention.tree_attention import tree_attention
from trl_fast.modeling.selective_checkpointing import Budget, ReusingMode, SavingMode
from trl_fast.ops.attention_merge import _merge_reference
from trl_fast.ops.backends import load_extension
from trl_fast.ops.layers import rms_norm

FLASH = {name: getattr(torch.ops.aten, name) for name in ("_flash_attention_forward", "_flash_attention_backward")}


@pytest.fixture
def stand_in(monkeypatch):
    """Yields the flash kernels of both: as attributes of torch.ops.aten, and as the dispatcher finds them."""
    aten, own = torch.library.Library("aten", "IMPL"), torch.library.Library("trl_fast", "IMPL")
    assert load_extension().ok
    kernels = VarlenOnTheCpu(monkeypatch)
    aten.impl("_flash_attention_forward", kernels.forward, "CPU")
    aten.impl("_flash_attention_backward", kernels.backward, "CPU")
    own.impl("merge_attention", _merge_reference, "CPU")
    yield kernels
    aten._destroy()
    own._destroy()


def results(run, given, upstream):
    out = run()
    return [out, *torch.autograd.grad(out, given, upstream)]


def both(stand_in, monkeypatch, trees, problem, **mask):
    """Returns output and gradients by Python and by C++, and the calls that each made."""
    *given, upstream = problem
    found = []
    for op in (None, torch.ops.trl_fast.eager_varlen_attention.default):
        monkeypatch.setattr(varlen, "eager_op", lambda *_, op=op: op)
        stand_in.calls.clear()
        found.append((results(lambda: tree_attention(*given, trees, 0.7, **mask), given, upstream), [*stand_in.calls]))
    return found


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("window", [None, 3])
def test_bits_and_calls_are_pythons(trees, window, stand_in, monkeypatch):
    (expected, told), (got, calls) = both(stand_in, monkeypatch, trees, problem(trees), window=window)
    assert calls == told and calls
    assert got[0].grad_fn.name() != expected[0].grad_fn.name()
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize("seed", range(12))
def test_any_row(seed, stand_in, monkeypatch):
    """Several trees, whose parts lie apart, with runs and windows: indices instead of ranges."""
    choice = random.Random(seed)
    trees = ((2, 1), *(random_tree(choice) for _ in range(choice.choice([0, 1, 2]))))
    runs = random_runs(choice, trees)
    mask = {"window": choice.choice([None, 2, 5]), "image_runs": runs, "whole_runs": bool(runs) and seed % 2 == 0}
    (expected, told), (got, calls) = both(stand_in, monkeypatch, trees, problem(trees, seed=seed), **mask)
    assert calls == told
    assert all(map(torch.equal, got, expected))


TREE = ((5, 3, (2, 4, 4)), (6,), (4, 2, 2))


def test_what_stands_apart_is_taken_by_an_index(stand_in, monkeypatch):
    calls = varlen._varlen_calls(varlen.RowMask(TREE), torch.device("cpu"), varlen.device_facts(torch.device("cpu")))
    assert any(isinstance(call.queries, torch.Tensor) for call in calls)
    (expected, _), (got, _) = both(stand_in, monkeypatch, TREE, problem(TREE))
    assert all(map(torch.equal, got, expected))


def test_only_what_trains_gets_a_gradient(stand_in, monkeypatch):
    query, key, value, upstream = problem(TREE)
    monkeypatch.setattr(varlen, "eager_op", lambda *_: torch.ops.trl_fast.eager_varlen_attention.default)
    query.requires_grad_(False)
    tree_attention(query, key, value, TREE).backward(upstream)
    assert query.grad is None and key.grad is not None and value.grad is not None
    with torch.no_grad():
        assert not tree_attention(query, key, value, TREE).requires_grad


def test_a_second_derivative_is_refused_by_name(stand_in, monkeypatch):
    query, key, value, _ = problem(TREE)
    monkeypatch.setattr(varlen, "eager_op", lambda *_: torch.ops.trl_fast.eager_varlen_attention.default)
    out = tree_attention(query, key, value, TREE)
    with pytest.raises(RuntimeError, match="attention of token trees has no second derivative"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


def test_checkpointing_keeps_what_the_kernels_gave(stand_in, monkeypatch):
    """The second pass calls no kernel; what stands before attention is computed again."""
    for name, packet in FLASH.items():
        monkeypatch.setattr(torch.ops.aten, name, packet)
    query, key, value, upstream = problem(TREE)
    monkeypatch.setattr(varlen, "eager_op", lambda *_: torch.ops.trl_fast.eager_varlen_attention.default)
    weight = torch.ones(query.shape[-1])

    def layer(query):
        return tree_attention(rms_norm(query, weight, 1e-6), key, value, TREE)

    def modes():
        saving = SavingMode(Budget(1 << 20, 1))
        return saving, ReusingMode(saving.results)

    expected = results(lambda: layer(query), (query, key, value), upstream)
    once = len(stand_in.calls)
    stand_in.calls.clear()
    checkpointed = torch.utils.checkpoint.checkpoint(layer, query, use_reentrant=False, context_fn=modes)
    got = results(lambda: checkpointed, (query, key, value), upstream)
    assert all(map(torch.equal, got, expected))
    assert len(stand_in.calls) == once
