"""Tree attention against a dense mask in float64, forward and backward."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from support.heads import error
from trl_fast.data.segments import num_tokens, segments_of
from trl_fast.modeling.attention import flex, plain
from trl_fast.modeling.attention import tree_attention as op
from trl_fast.modeling.attention.cpu import CpuRowAttention
from trl_fast.modeling.attention.flex import FlexAttention
from trl_fast.modeling.attention.row_attention import AttentionSpec
from trl_fast.modeling.attention.tree_attention import choose_kernels, fused_kernels_serve, tree_attention
from trl_fast.modeling.attention.varlen import CudaRowAttention
from trl_fast.ops.device import DeviceFacts, simulated_device

TREES = {
    "a pair": ((40, 17, 9),),
    "several trees": ((5, 3, 4), (1, 1, 1), (30, 2)),
    "one branch": ((12, 20),),
    "a hundred branches": ((9, *([2] * 100)),),
    "no branches": ((8,), (3,), (21,)),
    "no prompt": ((0, 5, 7),),
    "empty branches": ((6, 0, 4, 0), (3, 0)),
    "one token each": ((1, 1),),
    "nested": ((12, (5, 3, 4), 7), (9, (2, 6, (4, 1, 2)))),
    "nested, something empty": ((0, (6, 0, (3, 2, 0)), 4), (5, (0, 3, 2), (0,)), (3, ((1), 2))),
    "a chain": ((3, (2, (4, (1, (5, 2))))),),
}


def dense_mask(trees) -> torch.Tensor:
    """(T, T) bool, from the definition: token by token; a tree is read anew here."""
    tokens: list[tuple] = []  # a token is its sequence up to itself

    def read(tree, before):
        length, *children = (tree,) if isinstance(tree, int) else tree
        for _ in range(length):
            before = (*before, len(tokens))
            tokens.append(before)
        for child in children:
            read(child, before)

    for tree in trees:
        read(tree, ())
    return torch.tensor([[b[-1] in a for b in tokens] for a in tokens])


def problem(trees, heads=4, groups=2, dtype=torch.float32, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(map(num_tokens, trees))
    make = lambda h: torch.randn(1, h, tokens, width, generator=generator).to(dtype)  # noqa: E731
    return make(heads).requires_grad_(), make(groups).requires_grad_(), make(groups).requires_grad_(), make(heads)


def dense(query, key, value, trees, scale, dtype):
    upcast = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    repeats = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in upcast[1:])
    return F.scaled_dot_product_attention(upcast[0], k, v, attn_mask=dense_mask(trees), scale=scale), upcast


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients(trees, groups, scale, dtype):
    query, key, value, upstream = problem(trees, groups=groups, dtype=dtype)
    got = tree_attention(query, key, value, trees, scale)
    exact, upcast = dense(query, key, value, trees, scale, torch.float64)
    baseline, narrow = dense(query, key, value, trees, scale, dtype)
    grads = torch.autograd.grad(got, (query, key, value), upstream)
    exact_grads = torch.autograd.grad(exact, upcast, upstream.double())
    baseline_grads = torch.autograd.grad(baseline, narrow, upstream)
    floor = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    for a, b, c in zip((got, *grads), (baseline, *baseline_grads), (exact, *exact_grads), strict=True):
        assert a.dtype == dtype
        assert error(a, c) <= max(2 * error(b, c), floor)


def test_nothing_as_large_as_tokens_squared_is_built():
    from benchmarks.memory import measure_peak

    trees = ((3000, 500, 500),)
    query, key, value, upstream = problem(trees, heads=2, groups=1, width=8)

    def step():
        torch.autograd.grad(tree_attention(query, key, value, trees), (query, key, value), upstream)

    step()
    # A mask of bytes, for one head.
    assert measure_peak(step).peak_bytes < 4000 * 4000 / 4


def test_lengths_that_do_not_fit_are_refused():
    query, key, value, _ = problem(((4, 3),))
    with pytest.raises(ValueError, match="trees: lengths sum to 6, the row has 7 tokens"):
        tree_attention(query, key, value, ((4, 2),))
    with pytest.raises(ValueError, match="query: 4 heads are no multiple of the 3 key-value heads"):
        tree_attention(query, key.expand(1, 2, 7, 16)[:, [0, 1, 1]], value[:, [0, 1, 1]], ((4, 3),))


class VarlenOnTheCpu:
    """The varlen flash kernels by their contract, sequence by sequence, so that what they are told can be checked."""

    def __init__(self):
        self.calls = []

    def _sequences(self, *cu_seqlens):
        borders = [s.tolist() for s in cu_seqlens]
        return zip(*([slice(a, b) for a, b in zip(s[:-1], s[1:], strict=True)] for s in borders), strict=True)

    def _heads_first(self, x, heads):
        return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)[None]

    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout, causal, debug, *, scale):
        self.calls.append((max_q, max_k, causal))
        out, lse, heads = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0]), q.shape[1]
        for rows, columns in self._sequences(cu_seqlens_q, cu_seqlens_k):
            assert rows.stop - rows.start <= max_q and columns.stop - columns.start <= max_k
            given = (self._heads_first(x, heads) for x in (q[rows], k[columns], v[columns]))
            o, l = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, causal, scale=scale)
            out[rows], lse[:, rows] = o[0].transpose(0, 1), l[0]
        return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(
        self, g, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout, causal, rng, unused, *, scale
    ):
        assert rng.shape == (2,) and unused.shape == (0,)
        self.calls.append((max_q, max_k, causal))
        grads, heads = [torch.zeros_like(x) for x in (q, k, v)], q.shape[1]
        for rows, columns in self._sequences(cu_seqlens_q, cu_seqlens_k):
            given = [self._heads_first(x, heads) for x in (g[rows], q[rows], k[columns], v[columns], out[rows])]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, lse[None, :, rows], 0.0, causal, scale=scale
            )
            for total, place, part in zip(grads, (rows, columns, columns), found, strict=True):
                total[place] = part[0].unflatten(0, (total.shape[1], -1)).sum(1).transpose(0, 1)
        return tuple(grads)


class CudaOnTheCpu(CudaRowAttention):
    """CUDA's path for tensors on the CPU, in float32."""

    device_kind = None

    @staticmethod
    def supports(*_):
        return True, ""


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
def test_what_the_varlen_kernels_are_told(trees, monkeypatch):
    """CUDA's path with stand-ins for its two kernels; on a GPU, benchmarks.gpu_kit runs the real ones."""
    stand_in = VarlenOnTheCpu()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", stand_in.backward)
    monkeypatch.setattr(op, "KERNELS", (CudaOnTheCpu,))
    query, key, value, upstream = problem(trees)
    got = tree_attention(query, key, value, trees)
    exact, upcast = dense(query, key, value, trees, None, torch.float64)
    assert error(got, exact) < 2e-6
    grads = torch.autograd.grad(got, (query, key, value), upstream)
    for a, b in zip(grads, torch.autograd.grad(exact, upcast, upstream.double()), strict=True):
        assert error(a, b) < 3e-6
    continued = {segment.depth for segment in segments_of(trees) if segment.length and segment.is_continued}
    assert len(stand_in.calls) == 2 * (1 + len(continued))


# ---- without flash kernels


def plain_dense(query, key, value, trees, scale, softcap, dtype):
    """As a model's own eager attention computes it, in `dtype`, the softmax in float32 at least."""
    upcast = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    repeats = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in upcast[1:])
    scores = upcast[0] @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense_mask(trees), float("-inf")).to(torch.promote_types(dtype, torch.float32))
    return scores.softmax(-1).to(dtype) @ v, upcast


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("scale, softcap", [(None, None), (0.7, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_parts(trees, groups, scale, softcap, dtype, monkeypatch):
    """Tile by tile, with a score cap, and with values of another width than the keys."""
    monkeypatch.setattr(plain, "_TILE_BYTES", 4 * 4 * 40 * 7)
    query, key, value, upstream = problem(trees, groups=groups, dtype=dtype)
    value, upstream = value[..., :8].detach().requires_grad_(), upstream[..., :8]
    got = tree_attention(query, key, value, trees, scale, softcap)
    exact, upcast = plain_dense(query, key, value, trees, scale, softcap, torch.float64)
    baseline, narrow = plain_dense(query, key, value, trees, scale, softcap, dtype)
    grads = torch.autograd.grad(got, (query, key, value), upstream)
    exact_grads = torch.autograd.grad(exact, upcast, upstream.double())
    baseline_grads = torch.autograd.grad(baseline, narrow, upstream)
    # One token each: the gradients of the scores are differences of numbers that bfloat16 has rounded to be alike.
    floor = {torch.float32: 2e-6, torch.bfloat16: 3e-2 if trees == ((1, 1),) else 1e-2}[dtype]
    for a, b, c in zip((got, *grads), (baseline, *baseline_grads), (exact, *exact_grads), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert error(a, c) <= max(2 * error(b, c), floor)


def spec(trees=((9,),), softcap=None):
    return AttentionSpec(trees, 1.0, softcap)


@pytest.mark.parametrize(
    "tensor, width, softcap, reason",
    [
        (torch.empty(8), 8, None, None),
        (torch.empty(8), 8, 50.0, "cap no scores"),
        (torch.empty(8), 4, None, "keys of 8 and values of 4 channels"),
    ],
)
def test_what_the_flash_kernel_of_the_cpu_serves(tensor, width, softcap, reason):
    ok, why = CpuRowAttention.supports(tensor, tensor[:width], spec(softcap=softcap))
    assert ok == (reason is None) and (ok or reason in why)
    assert fused_kernels_serve(tensor, tensor[:width], spec(softcap=softcap)) == ok


def test_another_kind_of_device_has_plain_pytorch():
    tensor = torch.empty(8, device="meta")
    assert choose_kernels(tensor, tensor, spec()) is plain.PlainRowAttention
    assert not fused_kernels_serve(tensor, tensor, spec())


def on_a_gpu(dtype=torch.bfloat16, width=64, requires_grad=True, tokens=9):
    """A tensor on a GPU, as far as the choice of kernels looks at it."""
    device = torch.device("cuda")
    return SimpleNamespace(
        shape=(1, 4, tokens, width), dtype=dtype, device=device, is_cuda=True, requires_grad=requires_grad
    )


@pytest.mark.parametrize(
    "query, capability, softcap, reason",
    [
        (on_a_gpu(), (8, 0), None, None),
        (on_a_gpu(torch.float32), (9, 0), None, "CUDA's flash kernels take bfloat16 and float16, not torch.float32"),
        (
            on_a_gpu(width=36),
            (9, 0),
            None,
            "CUDA's flash kernels take heads of 8 to 256 channels in steps of 8, not 36",
        ),
        (on_a_gpu(), (7, 5), None, "the GPU is older than flash kernels"),
        (on_a_gpu(), (9, 0), 30.0, "flash kernels cap no scores"),
        # Trying a model out, before the trainer's autocast is there.
        (on_a_gpu(torch.float32, requires_grad=False), (9, 0), None, ""),
    ],
)
def test_a_gpu_without_flash_kernels_says_so_once(query, capability, softcap, reason, caplog, monkeypatch):
    monkeypatch.setattr(op, "KERNELS", tuple(kernels for kernels in op.KERNELS if kernels is not FlexAttention))
    op._say_it_is_plain.cache_clear()
    facts = DeviceFacts("cuda", multiplies_bf16=True, capability=capability)
    with caplog.at_level(logging.WARNING, "trl_fast"), simulated_device(facts, on="cuda"):
        kernels = [choose_kernels(query, query, spec(softcap=softcap)) for _ in range(3)]
    assert (kernels[0] is CudaRowAttention) == (reason is None)
    said = [f"Attention runs in plain PyTorch, which is slower on long rows: {reason}."] if reason else []
    assert [record.message for record in caplog.records] == said


@pytest.mark.parametrize("works", [True, False])
def test_flex_attention_serves_what_flash_kernels_do_not(works, monkeypatch, caplog):
    """Heads of 512 channels, float32 and capped scores, where it can be compiled; flash kernels come first."""
    monkeypatch.setattr(flex, "_trial", lambda kind: None if works else "it cannot be compiled")
    op._say_it_is_plain.cache_clear()
    facts = DeviceFacts("cuda", multiplies_bf16=True, capability=(9, 0))
    with caplog.at_level(logging.WARNING, "trl_fast"), simulated_device(facts, on="cuda"):
        for dtype, width, softcap in (
            (torch.bfloat16, 512, None),
            (torch.float32, 64, None),
            (torch.bfloat16, 64, 50.0),
        ):
            query = on_a_gpu(dtype, width, tokens=600)
            chosen = choose_kernels(query, query, spec(softcap=softcap))
            assert chosen is (FlexAttention if works else plain.PlainRowAttention)
            assert fused_kernels_serve(query, query, spec(softcap=softcap)) == works
        query = on_a_gpu(tokens=600)
        assert choose_kernels(query, query, spec()) is CudaRowAttention
    assert len(caplog.records) == (0 if works else 3)
    assert works or "flash kernels cap no scores; it cannot be compiled" in caplog.text
