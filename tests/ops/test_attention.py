"""Attention of a row of trees in one call: every result and gradient against float64 and against torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from support.attention_op import draw, ours, table_of
from support.instruction_sets import CPU_FLAGS, TILE_FLAGS, check_instruction_set
from support.row_attention import TREES, dense_mask
from trl_fast.data.segments import num_tokens
from trl_fast.ops.attention import TokenTable, row_attention, row_attention_backward
from trl_fast.ops.backends import supports

BACKENDS = ("cpp", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Those whose kernels differ in more than how numbers are read: bfloat16 may have tiles.
KINDS = (torch.float32, torch.bfloat16)
LONG = ((200, (70, 33, 90), 1, 150), (64,), (63, 65))
# Heads, key heads, width of keys and of values.
HEADS = [
    (9, 3, 64, 64),
    (4, 4, 32, 32),
    (3, 1, 80, 80),
    (2, 1, 96, 40),
    (7, 1, 100, 128),
    (1, 1, 128, 1),
    (2, 2, 256, 256),
    (33, 1, 1, 3),
]
MASKS = {
    "causal": {},
    "a window": {"window": 37},
    "a window of one": {"window": 1},
    "runs": {"runs": ((2, 30), (30, 38), (60, 61), (100, 171))},
    "runs and a window": {"runs": ((2, 30), (30, 38), (100, 171)), "window": 9},
    "whole runs and a window": {"runs": ((2, 30), (30, 38), (100, 171)), "window": 9, "whole_runs": True},
}


def plain(given, trees, mask, scale, softcap, dtype):
    """By the definition in `dtype`: SDPA with a mask of all pairs, or what it does not know written out."""
    query, key, value, grad = (x.detach().to(dtype) for x in given)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    k, v = (x.repeat_interleave(len(query) // len(x), dim=0) for x in leaves[1:])
    hidden = ~dense_mask(trees, **mask)
    scores = query @ k.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(hidden, float("-inf"))
    if softcap:
        out = scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(query[None], k[None], v[None], attn_mask=~hidden, scale=scale)[0]
    return out.detach(), scores.detach().logsumexp(-1), *torch.autograd.grad(out, leaves, grad)


def check(given, trees, mask=None, scale=None, softcap=0.0, backend="cpp"):
    """Holds every result to twice the error of the plain one in the same dtype, at its largest and summed.

    A rounding of the result is allowed beside the error: the plain one of a softmax of one key has none. The gradients
    of its query and key are 0, a difference of two sums of products. Our kernels take both in one order, so nothing is
    left but what float64 leaves of the exact ones; the reference in PyTorch leaves roundings of float32.
    """
    mask, dtype = mask or {}, given[0].dtype
    scale = given[0].shape[-1] ** -0.5 if scale is None else scale
    results = (
        ours(given, trees, mask, scale, softcap, backend),
        plain(given, trees, mask, scale, softcap, dtype),
        plain(given, trees, mask, scale, softcap, torch.float64),
    )
    query, key, value, grad = (x.abs().max().double() if x.numel() else 0.0 for x in given)
    largest = scale * grad * value * max(query, key)
    left = torch.finfo(torch.float64).eps * given[2].shape[-1] * largest
    cancelled = torch.finfo(torch.float32).eps * largest if backend == "torch" else left
    for name, got, baseline, exact in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert got.shape == exact.shape and got.dtype == (torch.float32 if name == "lse" else dtype)
        if got.numel() == 0:
            continue
        assert got.isfinite().all(), name
        errors = [(x.double() - exact).abs() for x in (got, baseline)]
        rounding = torch.finfo(got.dtype).eps * exact.abs() + (cancelled if exact.abs().max() < 1e-6 else left)
        assert errors[0].max() <= 2 * (errors[1].max() + max(rounding.max(), cancelled)), name
        assert errors[0].sum() <= 2 * (errors[1].sum() + rounding.sum()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_of_every_kind(heads, dtype, backend):
    check(draw(*heads, sum(map(num_tokens, LONG)), dtype), LONG, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_masks_and_caps(mask, softcap, dtype, backend):
    check(draw(4, 2, 32, 32, sum(map(num_tokens, LONG)), dtype), LONG, mask, None, softcap, backend)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES)
def test_small_trees(trees, dtype):
    for window in (None, 1, 5):
        check(draw(6, 2, 16, 16, sum(map(num_tokens, trees)), dtype), trees, {"window": window})


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65, 127, 129, 513])
def test_any_number_of_tokens(tokens, dtype):
    for heads in ((9, 3, 64, 64), (1, 1, 32, 32), (5, 1, 20, 20)):
        check(draw(*heads, tokens, dtype), ((tokens,),))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_long_prompt_and_many_branches(dtype):
    trees = ((900, *([17] * 20), (100, 40, 50)),)
    check(draw(2, 1, 64, 64, num_tokens(trees[0]), dtype), trees)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("tokens", [1100, 2100])
def test_long_sequences(tokens, window, dtype):
    """Backward takes two and four of their blocks together."""
    check(draw(2, 1, 16, 16, tokens + 30, dtype), ((tokens, 30),), {"window": window})


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("size", [1e-20, 30.0, 3e3])
def test_scores_of_any_size(size, dtype):
    """Scores of 1e4 and more: a token attends to one key alone; and all alike."""
    check(draw(3, 1, 64, 64, 200, dtype, size=size), ((120, 50, 30),))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_scores_that_grow_and_shrink_by_thousands(dtype):
    """Keys in the order of their scores, so that every block has another top."""
    for sign in (1, -1):
        query, key, value, grad = draw(2, 1, 8, 8, 700, dtype)
        query[..., 0], key[..., 0] = 10.0, sign * torch.linspace(-2000, 2000, 700)
        check((query, key, value, grad), ((700,),))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_nan_and_infinity_are_seen(dtype):
    query, key, value, _ = draw(2, 1, 16, 16, 100, dtype)
    key[0, 50, 3], query[1, 10, 2] = float("nan"), float("inf")
    out, lse = row_attention(query, key, value, table_of(((100,),)), 0.25, backend="cpp")
    assert out[:, 50:].isnan().all() and lse[:, 50:].isnan().all() and out[1, 10].isnan().all()
    assert out[0, :50].isfinite().all() and out[1, :10].isfinite().all() and out[1, 11:50].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_score_is_seen_in_the_gradients_of_what_the_token_sees(dtype):
    """Autograd's are NaN there, too."""
    given = [x.abs() for x in draw(2, 1, 16, 16, 100, dtype)]
    given[0][1, 10, 2] = float("inf")
    got, theirs = ours(given, ((100,),), {}, 0.25, 0.0, "cpp"), plain(given, ((100,),), {}, 0.25, 0.0, dtype)
    assert got[0][1, 10].isnan().all() and got[1][1, 10].isnan() and theirs[1][1, 10] == float("inf")
    assert ours(given, ((100,),), {}, 0.25, 0.0, "torch")[1][1, 10] == float("inf")
    assert got[2][1, 10].isnan().all() and theirs[2][1, 10].isnan().all()
    for gradient, other in zip(got[3:], theirs[3:], strict=True):
        assert gradient[:, :11].isnan().all() and other.isnan().all()


def strided(x):
    """The same numbers in other places: tokens first, with gaps, each last dimension apart or backwards."""
    room = torch.full((x.shape[1], x.shape[0] + 1, x.shape[2] + 3), float("nan"), dtype=x.dtype)
    room[:, :-1, 3:] = x.transpose(0, 1)
    return room[:, :-1, 3:].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype):
    given = draw(6, 2, 40, 24, 150, dtype)
    expected = ours(given, ((90, 40, 20),), {}, 0.2, 0.0, "cpp")
    for change in (strided, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = ours([change(x) for x in given], ((90, 40, 20),), {}, 0.2, 0.0, "cpp")
        assert all(map(torch.equal, got, expected))


def test_no_token_in_memory_of_any_layout():
    given = [x[:, ::2, ::2] for x in draw(4, 2, 8, 6, 0)]
    assert all(result.numel() == 0 for result in ours(given, ((0,),), {}, 0.2, 0.0, "cpp"))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    trees = ((500, 100, (200, 30, 40), 60),)
    given, before, found = draw(9, 3, 64, 64, num_tokens(trees[0]), dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 4):
            torch.set_num_threads(threads)
            found.append(ours(given, trees, {"window": 400}, 0.125, 0.0, "cpp"))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_no_memory_is_read_before_it_is_written(dtype):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        # torch.empty is only poisoned in this mode.
        torch.use_deterministic_algorithms(True)
        check(draw(5, 1, 20, 20, 131, dtype), ((70, 50, 11),))
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_softmax_of_more_keys():
    """Backward with merged results: gradients of a part are those of the whole."""
    query, key, value, grad = draw(4, 2, 32, 32, 90)
    table, sinks = table_of(((90,),)), torch.linspace(-1, 6, 4)
    out, lse = row_attention(query, key, value, table, 0.2)
    merged = torch.logaddexp(lse, sinks[:, None])
    out = out * (lse - merged).exp()[..., None]
    found = row_attention_backward(grad, query, key, value, out, merged, table, 0.2, backend="cpp")
    q, k, v, g = (x.double() for x in (query, key, value, grad))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = (q @ k.repeat_interleave(2, 0).mT * 0.2).masked_fill(~dense_mask(((90,),)), float("-inf"))
    scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, 90, 1)], dim=-1)
    exact = scores.softmax(-1)[..., :90] @ v.repeat_interleave(2, 0)
    for got, right in zip(found, torch.autograd.grad(exact, leaves, g), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    query, key, value, grad = draw(4, 2, 8, 6, 20)
    rest = (*table_of(((10, 6, 4),), window=7), 0.3, 0.0, backend)
    torch.library.opcheck(torch.ops.trl_fast.row_attention.default, (query, key, value, *rest))
    out, lse = torch.ops.trl_fast.row_attention(query, key, value, *rest)
    given = (grad, query, key, value, out, lse, *rest)
    torch.library.opcheck(torch.ops.trl_fast.row_attention_backward.default, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(4, 20)}, r"query: expected floats of shape \(heads, T, D\)"),
        ({"query": torch.zeros(0, 20, 8)}, r"query: expected one head or more, got shape \(0, 20, 8\)"),
        ({"query": torch.zeros(3, 20, 8)}, r"key: expected shape \(key heads, 20, 8\), of which 3 heads are"),
        ({"key": torch.zeros(2, 19, 8)}, r"key: expected shape \(key heads, 20, 8\)"),
        ({"value": torch.zeros(1, 20, 8)}, r"value: expected shape \(2, 20, Dv\)"),
        ({"value": torch.zeros(2, 20, 8).half()}, "query, key, value: expected one dtype"),
        ({"segments": [0, 19, 19, 0]}, "segments: they have 19 tokens, the row has 20"),
        ({"segments": [0, 20, 20]}, "segments: expected four numbers a segment, got 3"),
        ({"segments": [0, 9, 9, 0, 10, 20, 20, 0]}, "segments: number 1 does not stand behind the one before"),
        ({"segments": [0, 20, 21, 0]}, "segments: number 0 does not stand behind the one before"),
        ({"segments": [0, 20, 20, -1]}, "segments: number 0 has -1 tokens of its sequence before it, the row has 0"),
        ({"segments": [0, 9, 20, 0, 9, 20, 20, 10]}, "segments: number 1 has 10 tokens of its sequence before it"),
        ({"segments": [0, 8, 12, 0, 8, 20, 20, 8]}, "segments: number 1 ends behind one that it continues"),
        ({"runs": [3, 21]}, "runs: number 0 leaves the row"),
        ({"runs": [3, 5, -3, 2]}, "runs: number 1 leaves the row"),
        ({"runs": [3, 9, 8, 12]}, "runs: number 1 begins before the end of the one before"),
        ({"runs": [2, 15, 4, 6]}, "runs: number 1 begins before the end of the one before"),
        ({"runs": [3]}, "runs: expected two numbers a run"),
        ({"window": -1}, "window: expected tokens, or 0 for all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change, message, backend):
    given = dict(zip(("query", "key", "value"), draw(4, 2, 8, 8, 20)[:3], strict=True))
    table = {"segments": [0, 20, 20, 0], "runs": [], "whole_runs": False, "window": 0}
    for place in (given, table):
        place |= {name: value for name, value in change.items() if name in place}
    with pytest.raises(ValueError, match=message):
        row_attention(*given.values(), TokenTable(**table), 0.3, backend=backend)


def test_the_kernels_themselves_refuse_queries_without_heads():
    """A division by that number ended the process."""
    heads, nothing, lse = torch.zeros(2, 20, 8), torch.zeros(0, 20, 8), torch.zeros(0, 20)
    table = table_of(((20,),))
    with pytest.raises(ValueError, match="query: expected heads, a multiple of 2, got 0"):
        torch.ops.trl_fast.row_attention_forward(nothing, heads, heads, *table, 0.3, 0.0, nothing, lse)


def test_gradients_of_other_shapes_are_refused():
    query, key, value, grad = draw(4, 2, 8, 6, 20)
    table = table_of(((20,),))
    out, lse = row_attention(query, key, value, table, 0.3)
    for wrong in ((grad[..., 1:], out, lse), (grad, out.half(), lse), (grad, out, lse[1:])):
        with pytest.raises(ValueError, match="grad: expected|out: expected|lse: expected"):
            row_attention_backward(wrong[0], query, key, value, *wrong[1:], table, 0.3)


def test_there_is_a_cpp_kernel_only():
    assert supports("row_attention", "cpp", "cpu", torch.bfloat16).ok
    assert not supports("row_attention", "cpp", "cpu", torch.float64).ok
    assert supports("row_attention", "triton", "cpu", torch.float32).reason.startswith("there is no triton kernel")


def check_all_kernels():
    tokens = sum(map(num_tokens, LONG))
    for heads in HEADS:
        for dtype in DTYPES:
            check(draw(*heads, tokens, dtype), LONG)
    for mask in MASKS.values():
        for softcap, dtype in itertools.product((0.0, 1.5), KINDS):
            check(draw(4, 2, 32, 32, tokens, dtype), LONG, mask, None, softcap)
    for dtype in KINDS:
        test_scores_that_grow_and_shrink_by_thousands(dtype)
        test_nan_and_infinity_are_seen(dtype)
        test_no_memory_is_read_before_it_is_written(dtype)
        test_long_sequences(1100, 300, dtype)
        # A gradient of a key of one head, of which all tokens' rows are summed.
        for tokens in (127, 129):
            check(draw(1, 1, 32, 32, tokens, dtype), ((tokens,),))


@pytest.mark.parametrize("isa", CPU_FLAGS | TILE_FLAGS)
def test_every_instruction_set(isa):
    check_instruction_set(isa, check_all_kernels, tested_here=True)
