"""Linear layers of one input: bits of forward, gradients whose sums by the input are within the products."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support.layer_errors import DTYPES, check_errors, draw, results
from support.seen_operators import SeenOperators
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.ops.layers import joint_linear
from trl_fast.ops.linear import linear

CPU = torch.device("cpu")
SHAPES = [(3, 7, 20), (5, 20), (1, 1, 20), (0, 4, 20), (2, 65, 96)]


@pytest.fixture(params=[True, False], ids=["own products", "ATen's products"])
def products(request):
    """A CPU whose float32 products are ours or ATen's."""
    with simulated_device(replace(device_facts(CPU), own_products=request.param)):
        yield request.param


def ours(x, a, b, c, bias):
    return joint_linear(x, (a, b, c), (bias, None, None))


def plain(x, a, b, c, bias):
    return F.linear(x, a, bias), F.linear(x, b), F.linear(x, c)


def inputs(*shape, dtype=torch.float32):
    width = shape[-1]
    weights = [draw(out, width, seed=out, scale=width**-0.5, dtype=dtype) for out in (24, 8, 9)]
    return draw(*shape, dtype=dtype), *weights, draw(24, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, products):
    check_errors(ours, plain, plain, inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_layers_alone(shape, dtype, products):
    given = inputs(*shape, dtype=dtype)
    one = linear if products and dtype == torch.float32 and shape[:-1] != (1, 1) else F.linear
    x, *weights, bias = given
    for got, weight, added in zip(ours(*given), weights, (bias, None, None), strict=True):
        assert torch.equal(got, one(x, weight, added)) and got.is_contiguous()


def test_sums_are_within_the_products(products):
    given = inputs(2, 65, 96)
    made = ours(*given)
    with SeenOperators() as seen:
        torch.autograd.backward(made, [torch.ones_like(out) for out in made])
    assert not [name for name in seen.names if name.startswith("aten::add.")]
    adding = [name for name in seen.names if name in ("trl_fast::product", "aten::addmm_")]
    assert len(adding) == (6 if products else 2)


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3, 4), (1, 4), (2,), (0, 1, 2)], ids=str)
def test_only_what_trains_gets_a_gradient(frozen, products):
    given = inputs(5, 20)
    expected = results(plain, given)[3:]
    for i in frozen:
        given[i].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        made = ours(*given)
    # x for the weights, and the weights for x.
    needed = [given[0]] if len(frozen) < 4 else []
    needed += [*given[1:4]] if 0 not in frozen else []
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in needed)
    grads = [draw(*o.shape, seed=7 + i, dtype=torch.bfloat16).detach().float() for i, o in enumerate(made)]
    torch.autograd.backward(made, grads)
    for i, (tensor, right) in enumerate(zip(given, expected, strict=True)):
        assert (tensor.grad is None) is (i in frozen)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, right)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)], ids=str)
def test_results_that_nothing_follows(used):
    given = inputs(5, 20)
    got, right = (sum(f(*given)[i].square().sum() for i in used) for f in (ours, plain))
    grads = [torch.autograd.grad(loss, given, allow_unused=True) for loss in (got, right)]
    assert [grad is None for grad in grads[0]] == [grad is None for grad in grads[1]]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast():
    """Tensors of two dtypes; what autocast keeps of a weight for others still has its gradient."""
    given = inputs(3, 7, 20)
    given[1].data = given[1].data.bfloat16()

    def run(function):
        with torch.autocast("cpu", torch.bfloat16):
            made = function(*given)
            other = F.linear(given[0], given[2])
        assert {out.dtype for out in made} == {torch.bfloat16}
        loss = sum(out.float().square().sum() for out in (*made, other))
        return [out.detach() for out in made], torch.autograd.grad(loss, given)

    got, expected = run(ours), run(plain)
    assert all(map(torch.equal, got[0], expected[0]))
    for one, other in zip(got[1], expected[1], strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= 0.01 * other.norm()


def test_what_it_gives_may_be_written_to():
    given = inputs(3, 7, 20)
    made = ours(*given)
    made[0].clamp_(-0.5, 0.5)
    expected = plain(*given)
    grads = [torch.autograd.grad(out[0].clamp(-0.5, 0.5).sum(), given[0])[0] for out in (made, expected)]
    torch.testing.assert_close(*grads)


def test_a_retained_graph_gives_the_gradient_again(products):
    given = inputs(3, 7, 20)
    loss = sum(out.sum() for out in ours(*given))
    first, second = (torch.autograd.grad(loss, given, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused():
    given = inputs(5, 20)
    with pytest.raises(RuntimeError, match="joint_linear has no second derivative"):
        torch.autograd.grad(ours(*given)[0].square().sum(), given[0], create_graph=True)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[..., :0], "x"),
        (1, lambda t: t[:, 1:], "weights"),
        (2, lambda t: t.half(), "weights"),
        (4, lambda t: t[1:], "biases"),
    ],
)
def test_bad_input(place, change, message):
    given = [change(t) if i == place else t for i, t in enumerate(inputs(5, 20))]
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        ours(*given)
