"""FlexAttention over rows of nested trees against a dense mask in float64, and how often it is compiled.

There is no GPU here: what is compiled for one runs as plain PyTorch, by a backend that counts compilations.
"""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from support.heads import error
from support.row_attention import random_runs
from trl_fast.data.segments import num_tokens, segments_of
from trl_fast.modeling.attention import block_masks, flex
from trl_fast.modeling.attention.block_masks import block_mask, seen_blocks, token_bounds, visible_pairs, whole_blocks
from trl_fast.modeling.attention.flex import FlexAttention
from trl_fast.modeling.attention.flex_tiles import kernel_tiles
from trl_fast.modeling.attention.row_attention import AttentionSpec, RowMask
from trl_fast.modeling.attention.sinks import with_sinks
from trl_fast.ops.device import DeviceFacts, device_facts, simulated_device

CPU = torch.device("cpu")


def random_row(rng: random.Random, longest: int) -> tuple:
    """Trees of up to three levels, some segments empty."""

    def tree(depth):
        own = rng.choice((0, 1, rng.randrange(longest)))
        children = [tree(depth + 1) for _ in range(rng.randrange(1, 4))] if depth < 2 and rng.random() < 0.7 else []
        return (own, *(child[0] if len(child) == 1 and rng.random() < 0.5 else child for child in children))

    return ((longest, 3), *(tree(0) for _ in range(4)))


def dense_mask(row) -> torch.Tensor:
    """(T, T) bool, from the definition: a token sees the tokens of its path that come before it, and itself."""
    segments, window = segments_of(row.trees), row.window
    tokens = [(number, place) for number, one in enumerate(segments) for place in range(one.start, one.end)]
    position = {place: segments[n].offset + place - segments[n].start for n, place in tokens}

    def path(number):
        return set() if number is None else {number} | path(segments[number].parent)

    paths = [path(number) for number in range(len(segments))]
    mask = torch.tensor(
        [
            [m in paths[n] and b <= a and (window is None or position[a] - position[b] < window) for m, b in tokens]
            for n, a in tokens
        ]
    )
    for start, end in row.runs:
        run = mask[start:end, start:end]
        run |= torch.ones_like(run) if row.whole_runs else torch.ones_like(run).triu()
    return mask


@pytest.mark.parametrize("block", [4, 16])
def test_blocks_are_those_of_the_dense_mask(block, monkeypatch):
    monkeypatch.setattr(block_masks, "BLOCK", block)
    rng = random.Random(0)
    kinds = set()
    for _ in range(25):
        trees, window = random_row(rng, 40), rng.choice((None, 1, 3, 20, 70))
        row = RowMask(trees, window, rng.choice(((), random_runs(rng, trees))), rng.random() < 0.5)
        dense = dense_mask(row)
        count = max(-(-len(dense) // block), 2)
        padded = torch.zeros(count * block, count * block, dtype=torch.bool)
        padded[: len(dense), : len(dense)] = dense
        tiles = padded.unflatten(0, (count, block)).unflatten(2, (count, block)).transpose(1, 2)
        seen, whole = tiles.flatten(2).any(-1), tiles.flatten(2).all(-1)
        assert torch.equal(torch.from_numpy(seen_blocks(row)), seen)
        assert torch.equal(torch.from_numpy(whole_blocks(token_bounds(row))), whole)
        assert visible_pairs(row) == dense.sum()
        mask = block_mask(row, CPU, device_facts(CPU))
        wanted = (seen & ~whole, whole, (seen & ~whole).T, whole.T)
        for blocks, counts, listed in zip(wanted, mask.blocks[::2], mask.blocks[1::2], strict=True):
            assert counts.dtype == listed.dtype == torch.int32
            for row, number, entries in zip(blocks, counts[0, 0], listed[0, 0], strict=True):
                assert entries[:number].tolist() == row.nonzero()[:, 0].tolist()
            kinds.add(bool(counts.any()))
    assert kinds == {True, False}


@pytest.fixture
def compilations(monkeypatch):
    """Compiles for the CPU without Triton, with gradients; returns what was compiled so far."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    compiled = torch.compile(flex._attend, dynamic=False, fullgraph=True, backend=count)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    yield graphs
    torch._dynamo.reset()


def problem(row, dtype=torch.float64, width=24, value_width=16, seed=0):
    generator, tokens = torch.Generator().manual_seed(seed), sum(map(num_tokens, row.trees))

    def states(heads, width):
        made = torch.randn(1, tokens, heads, width, generator=generator, dtype=dtype).transpose(1, 2)
        return made.requires_grad_()

    return states(4, width), states(2, width), states(2, value_width)


def attention(query, key, value, row, softcap=None, sinks=None):
    out, lse = FlexAttention.attention(query, key, value, AttentionSpec(row, 0.4, softcap))
    return out if sinks is None else with_sinks(out, lse, sinks)[0]


def dense_attention(query, key, value, row, scale, softcap, sinks):
    key, value = (states.repeat_interleave(2, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~dense_mask(row), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(1, -1, scores.shape[2], 1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


def test_output_and_every_gradient_with_one_compilation(compilations):
    """Of rows of many lengths, with and without windows, runs and sinks; one more compilation for a cap of scores."""
    rng = random.Random(1)
    for number, (softcap, window, has_sinks) in enumerate(
        (
            (None, None, False),
            (None, 5, True),
            (None, 130, False),
            (1.5, 40, False),
            (1.5, None, True),
            (None, 1, True),
        )
    ):
        trees = (*random_row(rng, 30 + 17 * number), (140, 4, (6, 3, 2)))
        row = RowMask(trees, window, random_runs(rng, trees) if number % 3 else (), number == 4)
        states, sinks = problem(row), torch.randn(4, dtype=torch.float64, requires_grad=True) if has_sinks else None
        leaves = [*states, *([sinks] if has_sinks else [])]
        got = attention(*states, row, softcap, sinks)
        exact = dense_attention(*states, row, 0.4, softcap, sinks)
        upstream = torch.randn(exact.shape, dtype=torch.float64)
        pairs = zip(*(torch.autograd.grad(out, leaves, upstream) for out in (got, exact)), strict=True)
        assert error(got, exact) < 1e-12 and all(error(a, b) < 1e-11 for a, b in pairs)
        assert len(compilations) == (1 if number < 3 else 2)


def test_rows_that_are_tried_out_are_not_compiled_for_again(compilations):
    kind = flex._Kind(CPU, torch.float32, 4, 2, 24, 16, 0.4, None)
    assert flex._trial_error(kind) < 1e-5 and len(compilations) == 1
    for trees in (((300, 20, 9),), ((1000, 40, 50), (7,)), ((128,),)):
        attention(*problem(RowMask(trees), torch.float32), RowMask(trees))
    assert len(compilations) == 1


def test_a_compiled_model_calls_it(compilations):
    """Attention is left out of a model's own compilation, and is compiled by itself."""
    row = RowMask(((140, 3, 4),))
    outside = torch.compiler.disable(functools.partial(attention, row=row))
    model = torch.compile(lambda *states: outside(*(2 * one for one in states)).sum(), backend="eager")
    states = problem(row)
    model(*states).backward()
    exact = dense_attention(*(2 * one for one in states), row, 0.4, None, None).sum()
    assert error(states[0].grad, torch.autograd.grad(exact, states[0])[0]) < 1e-11 and len(compilations) == 1


def on_a_gpu(dtype=torch.bfloat16, width=512, tokens=512):
    device = torch.device("cuda")
    return SimpleNamespace(shape=(1, 4, tokens, width), dtype=dtype, device=device)


@pytest.mark.parametrize(
    "query, capability, reason",
    [
        (on_a_gpu(), (8, 0), None),
        (on_a_gpu(torch.float32), (9, 0), None),
        (on_a_gpu(torch.float64), (9, 0), "FlexAttention takes no torch.float64"),
        (on_a_gpu(width=8), (9, 0), "FlexAttention takes heads of 16 channels at least, not 8"),
        (on_a_gpu(), (7, 5), "the GPU is older than FlexAttention's kernels"),
        (on_a_gpu(tokens=511), (9, 0), "FlexAttention is not compiled for rows of fewer than 512 tokens"),
    ],
)
def test_what_it_serves(query, capability, reason, monkeypatch):
    monkeypatch.setattr(flex, "_trial", lambda kind: None)
    with simulated_device(DeviceFacts("cuda", multiplies_bf16=True, capability=capability), on="cuda"):
        ok, why = FlexAttention.supports(query, query, AttentionSpec(RowMask(((512,),)), 0.1))
    assert ok == (reason is None) and (ok or why == reason)


def test_what_does_not_work_on_a_short_row_is_not_used(compilations, monkeypatch):
    kind = flex._Kind(CPU, torch.float32, 4, 2, 24, 16, 0.4, 2.0)
    right = FlexAttention.attention
    monkeypatch.setattr(FlexAttention, "attention", lambda *given: (1.1 * right(*given)[0], None))
    assert flex._trial.__wrapped__(kind) == "FlexAttention's numbers are off by 0.1 on a short row"
    monkeypatch.setattr(FlexAttention, "attention", lambda *given: (right(*given)[0] / 0.0 * 0.0, None))
    assert flex._trial.__wrapped__(kind) == "FlexAttention's numbers are off by nan on a short row"

    def fails(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(flex, "_compiled", lambda: fails)
    monkeypatch.setattr(FlexAttention, "attention", right)
    reason = "FlexAttention could not be compiled or run (out of resource: shared memory)"
    assert flex._trial.__wrapped__(kind) == reason


def test_tiles_of_wide_heads_and_of_float32_divide_a_block():
    for dtype, widths in ((torch.bfloat16, (512,)), (torch.float32, (64, 80, 128, 256, 512))):
        for width in widths:
            tiles = kernel_tiles(width, dtype)
            assert {"fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps"} < tiles.keys()
            blocks = {name: size for name, size in tiles.items() if "BLOCK" in name}
            assert all(block_masks.BLOCK % size == 0 for size in blocks.values())
    assert kernel_tiles(128, torch.bfloat16) == {}
    # The wider one of keys and values decides.
    assert kernel_tiles(192, torch.float16) == kernel_tiles(256, torch.bfloat16) != {}
