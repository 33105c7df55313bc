"""Attention over two sets of keys, merged: PyTorch's way, the op around it, and what it refuses."""

import pytest
import torch

from support.merging import Parts, assert_merged, assert_nan_stays
from trl_fast.ops.attention_merge import _merge_reference, merge_attention, merge_into
from trl_fast.ops.backends import load_extension, supports
from trl_fast.ops.device import DeviceFacts, simulated_device

needs_extension = pytest.mark.skipif(not load_extension().ok, reason="the compiled extension is not there")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 8), (7, 4, 64), (40, 3, 96)])
def test_merged_as_in_float64(tokens, heads, width, dtype):
    parts = Parts(tokens, heads, width, dtype)
    before = [tensor.clone() for tensor in parts.given()]
    assert_merged(parts, *merge_attention(*parts.given()))
    for tensor, kept in zip(parts.given(), before, strict=True):
        torch.testing.assert_close(tensor, kept, rtol=0, atol=0, equal_nan=True)


def test_no_token_and_no_second_part():
    for tokens in (0, 4):
        out, lse = torch.randn(tokens, 2, 8), torch.randn(2, tokens)
        nothing = (torch.empty(0, 2, 8), torch.empty(2, 0), torch.full((tokens,), -1, dtype=torch.int32))
        merged, merged_lse = merge_attention(out, lse, *nothing)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
        assert tokens == 0 or (merged.data_ptr() != out.data_ptr() and merged_lse.data_ptr() != lse.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_in_place_in_groups_of_heads(dtype):
    """A CPU's parts: (key-value heads, heads of a group, t, D), rows of a longer row."""
    generator = torch.Generator().manual_seed(0)
    out, other = (torch.randn(2, 3, 9, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    lse, other_lse = (5 * torch.randn(2, 3, 9, generator=generator) for _ in range(2))
    rows = slice(2, 7)
    shares = torch.stack((lse, other_lse)).double().softmax(0)[..., None]
    exact = shares[0] * out.double() + shares[1] * other.double()
    exact_lse = torch.stack((lse, other_lse)).double().logsumexp(0)
    before = out.clone()
    merge_into(out[:, :, rows], lse[:, :, rows], other[:, :, rows], other_lse[:, :, rows])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(out[:, :, rows].double(), exact[:, :, rows], rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(lse[:, :, rows].double(), exact_lse[:, :, rows], rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, :, :2], before[:, :, :2]) and torch.equal(out[:, :, 7:], before[:, :, 7:])


def test_a_nan_of_a_part_is_not_dropped_in_place():
    out, other, lse, other_lse = torch.zeros(2, 4), torch.ones(2, 4), torch.zeros(2), torch.zeros(2)
    other_lse[1] = float("nan")
    merge_into(out, lse, other, other_lse)
    assert out[0].eq(0.5).all() and out[1].isnan().all() and lse.isnan().tolist() == [False, True]


def test_opcheck():
    torch.library.opcheck(torch.ops.trl_fast.attention_merge, Parts(7, 2, 16, torch.float32).given())


def test_a_nan_stays_in_its_token():
    assert_nan_stays(merge_attention)


def test_kernels_are_those_of_gpus(monkeypatch):
    given = Parts(7, 2, 16, torch.float32).given()
    no_kernel = "there is no cpp kernel of it, only in cuda and triton"
    assert supports("attention_merge", "cpp", "cpu", torch.bfloat16) == (False, no_kernel)
    with pytest.raises(RuntimeError, match="backend='cuda' was forced .* the CUDA kernels run on a GPU, not on cpu"):
        merge_attention(*given, backend="cuda")
    monkeypatch.setenv("TRL_FAST_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match=f"TRL_FAST_BACKEND='cpp' was forced for attention_merge.*{no_kernel}"):
        merge_attention(*given)


@needs_extension
def test_the_compiled_op_serves_where_it_can(monkeypatch):
    """A stand-in for the CUDA kernel, on a device that a CPU's tensors are taken to be on."""
    given, calls = Parts(7, 2, 16, torch.bfloat16).given(), []

    def stand_in(*tensors):
        calls.append(tensors)
        return _merge_reference(*tensors)

    with torch.library._scoped_library("trl_fast", "IMPL") as library:
        library.impl("merge_attention", stand_in, "CPU")
        torch.library.opcheck(torch.ops.trl_fast.merge_attention, given, test_utils=("test_schema", "test_faketensor"))
        calls.clear()
        gpu = DeviceFacts("cuda", True, serves=lambda op, backend: backend in ("cuda", "triton"))
        with simulated_device(gpu):
            merged = merge_attention(*given)
            assert len(calls) == 1
            monkeypatch.setenv("TRL_FAST_BACKEND", "torch")
            in_torch = merge_attention(*given)
    assert len(calls) == 1
    for one, two in zip(merged, in_torch, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("lse", lambda x: x.double(), r"lse: expected torch.float32 of shape \(2, 7\) on cpu, got torch.float64"),
        ("lse", lambda x: x.t(), r"lse: expected torch.float32 of shape \(2, 7\) on cpu, got torch.float32 \(7, 2\)"),
        ("other", lambda x: x.half(), "other: expected torch.float32 of shape"),
        ("other", lambda x: x[..., :8], r"other: expected torch.float32 of shape \(5, 2, 16\)"),
        ("other", lambda x: x.mT.contiguous().mT, "other: expected a contiguous last dimension"),
        ("other_lse", lambda x: x[:, 1:], r"other_lse: expected torch.float32 of shape \(2, 5\)"),
        ("place", lambda x: x.long(), r"place: expected torch.int32 of shape \(7,\)"),
        ("place", lambda x: x.to("meta"), "place: expected torch.int32 .* on meta"),
    ],
)
def test_bad_input_is_named(name, change, message):
    names = ("out", "lse", "other", "other_lse", "place")
    given = dict(zip(names, Parts(7, 2, 16, torch.float32).given(), strict=True))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        merge_attention(**given)
