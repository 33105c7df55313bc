"""Gated activations of rows that hold both halves: numbers and rounding of transformers' MLPs, one gradient."""

import pytest
import torch
import torch.nn.functional as F

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from support.seen_operators import SeenOperators
from trl_fast.ops.layers import ACTIVATIONS, chunked_gated_activation

SHAPES = [(3, 7, 40), (1, 18), (0, 32), (1, 2), (2, 2062), (4, 0), (10,)]
PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def plain(activation):
    def function(both):
        gate, up = both.chunk(2, dim=-1)
        return up * PLAIN[activation](gate)

    return function


def ours(activation, backend):
    return lambda both: chunked_gated_activation(both, activation, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, activation, backend):
    check_errors(
        ours(activation, backend), plain(activation), plain(activation), (draw(*shape, dtype=dtype, scale=3.0),)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_and_gradients(backend):
    given = (draw(10, 5, 3),)
    for arrange in (lambda t: t.permute(2, 1, 0), lambda t: t.transpose(0, 2)[:, ::2]):

        def run(function, arrange=arrange):
            return lambda w: function(arrange(w)).transpose(0, 1)

        theirs = results(run(plain("silu")), given)
        for got, want in zip(results(run(ours("silu", backend)), given), theirs, strict=True):
            torch.testing.assert_close(got, want)


def test_halves_are_read_where_they_lie():
    both = torch.randn(4, 5, 32)
    with SeenOperators() as seen:
        got = chunked_gated_activation(both, backend="cpp")
    given = seen.arguments[seen.names.index("trl_fast::layer_gated_activation")]
    assert [t.data_ptr() for t in given[:2]] == [t.data_ptr() for t in both.chunk(2, dim=-1)]
    torch.testing.assert_close(got, plain("silu")(both))


def test_backward_keeps_what_it_was_given():
    both = draw(6, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        chunked_gated_activation(both)
    assert [t.data_ptr() for t in saved] == [both.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    both = draw(3, 20)
    torch.library.opcheck(torch.ops.trl_fast.chunked_gated_activation.default, (both, "silu", backend))
    backward = torch.ops.trl_fast.chunked_gated_activation_backward.default
    torch.library.opcheck(backward, (torch.ones(3, 10), both.detach(), "gelu", backend))


@pytest.mark.parametrize(
    ("both", "activation", "message"),
    [
        (torch.ones(2, 3), "silu", "gate_up"),
        (torch.ones(2, 4).int(), "silu", "gate_up"),
        (torch.ones(2, 4), "relu", "relu"),
    ],
)
def test_bad_input(both, activation, message):
    with pytest.raises(ValueError, match=message):
        chunked_gated_activation(both, activation)
