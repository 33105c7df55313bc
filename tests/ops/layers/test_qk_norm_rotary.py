"""Norms of queries and keys and their rotation in one pass: transformers' numbers and rounding, and gradients."""

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo2_rotary

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from support.plain_norms import EPS, PLAIN_NORMS, exact_norm
from trl_fast.ops.layers import qk_norm_rotary
from trl_fast.ops.layers.rotations import turn_reference

# How norms are rounded, whether a token has one norm, how wide cos is beside a head, whether it is float32, and the
# rotation.
FAMILIES = {
    "qwen3": ("llama", False, 1, False, apply_rotary_pos_emb),
    "gemma3": ("gemma", False, 1, False, apply_rotary_pos_emb),
    "qwen3_next": ("gemma", False, 0.5, False, partial_rotary),
    "olmo2": ("olmo", True, 1, True, olmo2_rotary),
}
SHAPES = [(2, 5, 4, 2, 20), (1, 1, 1, 1, 4), (1, 33, 3, 3, 64), (0, 5, 4, 2, 8), (2, 0, 4, 2, 8), (3, 7, 1, 1, 36)]


def inputs(batch, tokens, heads, key_heads, width, dtype, family):
    """Returns queries and keys, views of (B, T, heads, D), their weights, cos and sin."""
    _, is_joint, share, in_float32, _ = FAMILIES[family]
    query, key = (draw(batch, tokens, h, width, seed=h, dtype=dtype).transpose(1, 2) for h in (heads, key_heads))
    lengths = (h * width if is_joint else width for h in (heads, key_heads))
    weights = (draw(n, seed=20 + i, dtype=dtype) for i, n in enumerate(lengths))
    angles = draw(1, tokens, max(2, int(share * width) // 2 * 2), seed=3, scale=3.0).detach()
    to = torch.float32 if in_float32 else dtype
    return (query, key, *weights), angles.cos().to(to), angles.sin().to(to)


def plain(norm, turn, is_joint):
    """Returns transformers' way: the norm of (B, T, heads, D) or of (B, T, heads · D), then the rotation."""

    def normed(x, weight):
        by_tokens = x.transpose(1, 2)
        rows = by_tokens.flatten(2) if is_joint else by_tokens
        return norm(rows, weight).view(by_tokens.shape).transpose(1, 2)

    return lambda q, k, qw, kw: turn(normed(q, qw), normed(k, kw))


def theirs(family, cos, sin):
    cast, is_joint, _, _, turn = FAMILIES[family]
    return plain(PLAIN_NORMS[cast], lambda q, k: turn(q, k, cos, sin), is_joint)


def exact(family, cos, sin):
    cast, is_joint, *_ = FAMILIES[family]
    angles = cos.double(), sin.double()

    def turn(q, k):
        return tuple(turn_reference(x, *angles, "halves", False, False, False) for x in (q, k))

    return plain(exact_norm(cast), turn, is_joint)


def ours(family, cos, sin, backend):
    cast, is_upcast = FAMILIES[family][0], FAMILIES[family][3]
    way = {"cast": cast, "upcast": is_upcast, "backend": backend}
    return lambda q, k, qw, kw: qk_norm_rotary(q, k, qw, kw, EPS, cos, sin, **way)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_transformers(shape, dtype, family, backend):
    given, cos, sin = inputs(*shape, dtype, family)
    check_errors(ours(family, cos, sin, backend), theirs(family, cos, sin), exact(family, cos, sin), given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_those_of_transformers(dtype, family, backend):
    given, cos, sin = inputs(2, 9, 4, 2, 64, dtype, family)
    found = results(ours(family, cos, sin, backend), given), results(theirs(family, cos, sin), given)
    for got, want in list(zip(*found, strict=True))[:2]:
        assert (got == want).float().mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_strides(family, backend):
    """Strides of every kind, of what is given and of its gradient."""
    (query, key, *weights), cos, sin = inputs(2, 5, 4, 2, 20, torch.float32, family)
    for arrange in (torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT):

        def run(function, arrange=arrange):
            return lambda q, k, *w: tuple(arrange(t) for t in function(arrange(q), arrange(k), *w))

        given = query, key, *weights
        expected = results(run(theirs(family, cos, sin)), given)
        for got, want in zip(results(run(ours(family, cos, sin, backend)), given), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_nothing_in_memory_of_any_layout(batch, tokens, backend):
    """An empty tensor counts as contiguous whatever its strides."""
    given, cos, sin = inputs(batch, tokens, 4, 2, 40, torch.float32, "qwen3")
    given, (cos, sin) = [t[..., ::2] for t in given], (t[..., ::2] for t in (cos, sin))
    found = results(ours("qwen3", cos, sin, backend), given)
    assert [tuple(t.shape) for t in found[2:4]] == [tuple(t.shape) for t in given[:2]]
    assert all((gradient == 0).all() for gradient in found[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_get_no_gradient(backend):
    given, cos, sin = inputs(2, 40, 4, 2, 20, torch.float32, "qwen3")
    expected = results(theirs("qwen3", cos, sin), given)[2:]
    frozen = [t.detach().requires_grad_(i < 2) for i, t in enumerate(given)]
    outs = ours("qwen3", cos, sin, backend)(*frozen)
    grads = [draw(*o.shape, seed=7 + i, dtype=torch.bfloat16).detach().float() for i, o in enumerate(outs)]
    for got, want in zip(torch.autograd.grad(outs, frozen[:2], grads), expected[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got = results(ours("qwen3", cos, sin, backend), given)[2:]
    for gradient, want in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


def test_backward_keeps_what_it_was_given_and_a_number_a_norm():
    given, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32, "qwen3")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk_norm_rotary(*given, EPS, cos, sin)
    pointers = {t.data_ptr() for t in (*given, cos, sin)}
    assert sorted(t.numel() for t in saved if t.data_ptr() not in pointers) == [20, 40]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family, backend):
    given, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32, family)
    leaves = [t.detach().requires_grad_() for t in given]
    way = (EPS, FAMILIES[family][0], "halves", False, FAMILIES[family][3], backend)
    torch.library.opcheck(torch.ops.trl_fast.qk_norm_rotary.default, (*leaves, cos, sin, *way))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[0], "query"),
        (1, lambda t: t.half(), "key"),
        (2, lambda t: t[1:], "query_weight"),
        (3, lambda t: t.half(), "key_weight"),
    ],
)
def test_bad_input(place, change, message):
    given, cos, sin = inputs(2, 5, 4, 2, 20, torch.float32, "qwen3")
    given = [change(t) if i == place else t for i, t in enumerate(given)]
    with pytest.raises(ValueError, match=message):
        qk_norm_rotary(*given, EPS, cos, sin)
    with pytest.raises(ValueError, match="cast"):
        qk_norm_rotary(*inputs(2, 5, 4, 2, 20, torch.float32, "qwen3")[0], EPS, cos, sin, cast="t5")
