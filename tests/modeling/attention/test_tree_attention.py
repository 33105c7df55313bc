"""Tree attention against a dense mask in float64, forward and backward."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from support.heads import error
from support.row_attention import TREES, VarlenOnTheCpu, dense, dense_mask, problem
from trl_fast.data.segments import segments_of
from trl_fast.modeling.attention import flex, plain
from trl_fast.modeling.attention import tree_attention as op
from trl_fast.modeling.attention.cpu import CompiledRowAttention, CpuRowAttention
from trl_fast.modeling.attention.flex import FlexAttention
from trl_fast.modeling.attention.row_attention import AttentionSpec, RowMask
from trl_fast.modeling.attention.tree_attention import choose_kernels, fused_kernels_serve, tree_attention
from trl_fast.modeling.attention.varlen import CudaRowAttention
from trl_fast.ops.device import DeviceFacts, simulated_device


def sdpa(query, key, value, trees, scale, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    repeats = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in leaves[1:])
    return F.scaled_dot_product_attention(leaves[0], k, v, attn_mask=dense_mask(trees), scale=scale), leaves


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", [CompiledRowAttention, CpuRowAttention], ids=lambda kernels: kernels.__name__)
def test_output_and_gradients(trees, groups, scale, dtype, kernels, monkeypatch):
    monkeypatch.setattr(op, "KERNELS", (kernels,))
    query, key, value, upstream = problem(trees, groups=groups, dtype=dtype)
    got = tree_attention(query, key, value, trees, scale)
    exact, upcast = sdpa(query, key, value, trees, scale, torch.float64)
    baseline, narrow = sdpa(query, key, value, trees, scale, dtype)
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


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
def test_what_the_varlen_kernels_are_told(trees, monkeypatch):
    """CUDA's path with stand-ins for its two kernels; on a GPU, benchmarks.gpu_kit runs the real ones."""
    stand_in = VarlenOnTheCpu(monkeypatch)
    query, key, value, upstream = problem(trees)
    got = tree_attention(query, key, value, trees)
    exact, upcast = dense(query, key, value, trees, torch.float64)
    assert error(got, exact) < 2e-6
    grads = torch.autograd.grad(got, (query, key, value), upstream)
    for a, b in zip(grads, torch.autograd.grad(exact, upcast, upstream.double()), strict=True):
        assert error(a, b) < 3e-6
    continued = {segment.depth for segment in segments_of(trees) if segment.length and segment.is_continued}
    assert len(stand_in.calls) == 2 * (1 + len(continued))


# ---- without flash kernels


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("scale, softcap", [(None, None), (0.7, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_parts(trees, groups, scale, softcap, dtype, monkeypatch):
    """Tile by tile, with a score cap, and with values of another width than the keys."""
    monkeypatch.setattr(plain, "_TILE_BYTES", 4 * 4 * 40 * 7)
    monkeypatch.setattr(op, "KERNELS", (plain.PlainRowAttention,))
    query, key, value, upstream = problem(trees, groups=groups, dtype=dtype)
    value, upstream = value[..., :8].detach().requires_grad_(), upstream[..., :8]
    got = tree_attention(query, key, value, trees, scale, softcap)
    exact, upcast = dense(query, key, value, trees, torch.float64, scale=scale, softcap=softcap)
    baseline, narrow = dense(query, key, value, trees, dtype, scale=scale, softcap=softcap)
    grads = torch.autograd.grad(got, (query, key, value), upstream)
    exact_grads = torch.autograd.grad(exact, upcast, upstream.double())
    baseline_grads = torch.autograd.grad(baseline, narrow, upstream)
    # One token each: the gradients of the scores are differences of numbers that bfloat16 has rounded to be alike.
    floor = {torch.float32: 2e-6, torch.bfloat16: 3e-2 if trees == ((1, 1),) else 1e-2}[dtype]
    for a, b, c in zip((got, *grads), (baseline, *baseline_grads), (exact, *exact_grads), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert error(a, c) <= max(2 * error(b, c), floor)


def spec(trees=((9,),), softcap=None):
    return AttentionSpec(RowMask(trees), 1.0, softcap)


@pytest.mark.parametrize(
    "tensor, width, softcap, reason",
    [
        (torch.empty(8), 8, None, None),
        (torch.empty(8), 8, 50.0, "cap no scores"),
        (torch.empty(8), 4, None, "keys of 8 and values of 4 channels"),
    ],
)
def test_what_the_flash_kernel_of_the_cpu_serves(tensor, width, softcap, reason, monkeypatch):
    monkeypatch.setenv("TRL_FAST_BACKEND", "torch")
    ok, why = CpuRowAttention.supports(tensor, tensor[:width], spec(softcap=softcap))
    assert ok == (reason is None) and (ok or reason in why)
    assert fused_kernels_serve(tensor, tensor[:width], spec(softcap=softcap)) == ok


def test_what_the_compiled_kernels_serve(monkeypatch):
    """Every width and cap, in the dtypes of the kernels; what they do not serve has torch's flash kernel."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.empty(8, dtype=dtype)
        assert choose_kernels(tensor, tensor[:4], spec(softcap=50.0)) is CompiledRowAttention
        assert choose_kernels(tensor, tensor, spec()) is CompiledRowAttention
    assert choose_kernels(tensor.double(), tensor.double(), spec()) is CpuRowAttention
    monkeypatch.setenv("TRL_FAST_BACKEND", "torch")
    ok, why = CompiledRowAttention.supports(tensor.float(), tensor.float(), spec())
    assert not ok and why == "TRL_FAST_BACKEND=torch"
    assert choose_kernels(tensor.float(), tensor.float(), spec()) is CpuRowAttention


def test_a_row_is_returned_as_the_next_layer_reads_it():
    """Tokens first, as projections give and take them: nothing is copied on the way."""
    query, key, value, upstream = problem(((9, 4, 3),))
    out = tree_attention(query, key, value, ((9, 4, 3),))
    assert out.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(out, (query, key, value), upstream):
        assert gradient.transpose(1, 2).is_contiguous()


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
