"""Attention over two sets of keys, merged: PyTorch's way, the op around it, and what it refuses."""

import pytest
import torch

from support.merging import Parts, assert_merged
from trl_fast.ops.attention_merge import merge_attention, merge_into
from trl_fast.ops.backends import supports

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


def test_opcheck():
    torch.library.opcheck(torch.ops.trl_fast.attention_merge, Parts(7, 2, 16, torch.float32).given())


def test_there_is_a_triton_kernel_only():
    for backend in ("cuda", "cpp"):
        found = supports("attention_merge", backend, "cpu", torch.bfloat16)
        assert found == (False, f"there is no {backend} kernel of it, only in triton")


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
