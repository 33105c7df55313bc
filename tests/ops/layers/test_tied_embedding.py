"""An embedding and a head with one weight: autograd's gradients, and no second one as large as the weight."""

import pytest
import torch
import torch.nn.functional as F

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from trl_fast.ops.layers import tied_embedding

SHAPES = [(11, 20, (3, 7)), (1, 5, (4,)), (300, 33, (2, 2, 90)), (7, 1, (5,)), (9, 16, (0,))]


def tokens(vocabulary, shape):
    """Returns tokens of which some are frequent and some are none."""
    drawn = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return torch.where(drawn % 3 == 0, drawn // 2, drawn)


def plain(ids, padding_idx=None):
    def function(weight):
        rows = F.embedding(ids, weight, padding_idx)
        return rows, rows @ weight.t()

    return function


def ours(ids, backend, padding_idx=None):
    def function(weight):
        rows, head = tied_embedding(ids, weight, padding_idx, backend=backend)
        return rows, rows @ head.t()

    return function


class Head(torch.autograd.Function):
    """Multiplies by a weight; its gradient by that is a tensor whose place in memory is known."""

    pointers: list[int] = []

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return rows @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        by_weight = grad.t() @ rows
        Head.pointers.append(by_weight.data_ptr())
        return grad @ weight, by_weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, padding_idx, backend):
    vocabulary, width, many = shape
    ids = tokens(vocabulary, many)
    way = plain(ids, padding_idx)
    check_errors(ours(ids, backend, padding_idx), way, way, (draw(vocabulary, width, dtype=dtype),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_added_to_the_gradient_of_the_head(backend):
    ids, weight = tokens(50, (21,)), draw(50, 20)
    rows, head = tied_embedding(ids, weight, backend=backend)
    Head.apply(rows, head).square().sum().backward()
    assert weight.grad.data_ptr() == Head.pointers.pop()
    expected = torch.autograd.grad(plain(ids)(weight)[1].square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_use_alone(used, backend):
    ids, weight = tokens(50, (21,)), draw(50, 20)
    uses = tied_embedding(ids, weight, backend=backend)
    theirs = F.embedding(ids, weight), weight
    got, want = (torch.autograd.grad(t[used].pow(3).sum(), weight)[0] for t in (uses, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_head_that_is_transposed(backend):
    ids, weight = tokens(50, (21,)), draw(50, 20)
    rows, head = tied_embedding(ids, weight, backend=backend)
    loss = (rows.sum() + (head.t().contiguous() * draw(20, 50, seed=3).detach()).sum()).square()
    want = (F.embedding(ids, weight).sum() + (weight.t() * draw(20, 50, seed=3).detach()).sum()).square()
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(want, weight)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_and_a_retained_graph_gives_them_again(backend):
    ids, weight = tokens(50, (21,)), draw(50, 20)
    loss = ours(ids, backend)(weight)[1].square().sum()
    (expected,) = torch.autograd.grad(plain(ids)(weight)[1].square().sum(), weight)
    for count in (1, 2):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(weight.grad, count * expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_no_leaf(backend):
    """As under FSDP, whose weights are parts of what trains."""
    ids, flat = tokens(50, (21,)), draw(1000)
    got = results(lambda t: ours(ids, backend)(t.view(50, 20)), (flat,))
    for one, other in zip(got, results(lambda t: plain(ids)(t.view(50, 20)), (flat,)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_weight_of_the_head_is_no_copy():
    weight = draw(50, 20)
    assert tied_embedding(tokens(50, (3,)), weight)[1].data_ptr() == weight.data_ptr()


def test_a_second_derivative_is_refused():
    ids, weight = tokens(11, (3,)), draw(11, 20)
    loss = ours(ids, "torch")(weight)[1].square().sum()
    with pytest.raises(RuntimeError, match="tied_embedding has no second derivative"):
        torch.autograd.grad(loss, weight, create_graph=True)
