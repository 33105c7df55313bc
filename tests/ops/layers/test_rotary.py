"""Rotary embeddings in one pass: transformers' numbers and rounding, gradients, and what backward keeps."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from trl_fast.ops.layers import rotary


def inputs(batch, tokens, heads, key_heads, width, dtype, rows=None):
    """Returns queries and keys as layers make them, views of (B, T, heads, D); cos and sin with halves that differ."""
    query, key = (draw(batch, tokens, h, width, seed=h, dtype=dtype).transpose(1, 2) for h in (heads, key_heads))
    angles = draw(rows or batch, tokens, width, seed=3, scale=3.0).detach()
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


SHAPES = [(2, 5, 4, 2, 20), (1, 1, 1, 1, 2), (1, 33, 3, 3, 64), (0, 5, 4, 2, 8), (2, 0, 4, 2, 8), (3, 7, 1, 1, 34)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, backend):
    query, key, cos, sin = inputs(*shape, dtype)
    check_errors(
        lambda q, k: rotary(q, k, cos, sin, backend=backend),
        lambda q, k: apply_rotary_pos_emb(q, k, cos, sin),
        lambda q, k: apply_rotary_pos_emb(q, k, cos.double(), sin.double()),
        (query, key),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_those_of_transformers(dtype, backend):
    """All of them, forward and backward: nothing is summed in another order."""
    query, key, cos, sin = inputs(2, 9, 4, 2, 20, dtype, rows=1)
    ours = results(lambda q, k: rotary(q, k, cos, sin, backend=backend), (query, key))
    theirs = results(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), (query, key))
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Strides of every kind, of what is given and of its gradient."""
    query, key, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32)
    cos, sin = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (cos, sin))
    for arrange in (lambda t: t, torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT):

        def run(function, arrange=arrange):
            return lambda q, k: tuple(arrange(t) for t in function(arrange(q), arrange(k), cos, sin))

        ours = results(run(lambda *given: rotary(*given, backend=backend)), (query, key))
        for got, want in zip(ours, results(run(apply_rotary_pos_emb), (query, key)), strict=True):
            torch.testing.assert_close(got, want)


def test_results_are_laid_out_by_tokens():
    query, key, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32)
    for turned in rotary(query, key, cos, sin):
        assert turned.transpose(1, 2).is_contiguous()


def test_only_one_of_both_has_a_gradient():
    query, key, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32)
    (grad,) = torch.autograd.grad(rotary(query, key, cos, sin)[1].sum(), key)
    (expected,) = torch.autograd.grad(apply_rotary_pos_emb(query, key, cos, sin)[1].sum(), key)
    torch.testing.assert_close(grad, expected)


def test_backward_keeps_neither_query_nor_key():
    query, key, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(query, key, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    query, key, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32)
    query, key = (t.detach().requires_grad_() for t in (query, key))
    torch.library.opcheck(torch.ops.trl_fast.rotary.default, (query, key, cos, sin, False, backend))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda t: t[..., :7]),
        ("query", lambda t: t[0]),
        ("key", lambda t: t[:, :, :2]),
        ("key", lambda t: t.half()),
        ("cos", lambda t: t[:, :2]),
        ("cos", lambda t: t.half()),
        ("sin", lambda t: t.clone().requires_grad_()),
    ],
)
def test_bad_input(name, change):
    given = dict(zip(("query", "key", "cos", "sin"), inputs(2, 5, 4, 2, 20, torch.float32), strict=True))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=name):
        rotary(**given)
