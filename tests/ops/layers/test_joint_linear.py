"""Linear layers of one input, with adapters or not: bits of forward, gradients summed by the input within products."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support.layer_errors import DTYPES, check_errors, draw, results
from support.seen_operators import SeenOperators
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.ops.layers import Adapter, joint_linear, lora_linear
from trl_fast.ops.linear import linear

CPU = torch.device("cpu")
SCALING = 1.5
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


def with_adapters(x, a, b, c, bias, *lora):
    """The first and the last layer have one, of ranks 4 and 2."""
    adapters = Adapter(*lora[:2], SCALING), None, Adapter(*lora[2:], -SCALING)
    return joint_linear(x, (a, b, c), (bias, None, None), adapters)


def one_by_one(x, a, b, c, bias, *lora):
    first = lora_linear(x, a, bias, *lora[:2], SCALING)
    return first, F.linear(x, b), lora_linear(x, c, None, *lora[2:], -SCALING)


def peft(x, a, b, c, bias, *lora):
    first, second, third = plain(x, a, b, c, bias)
    low, other = (F.linear(F.linear(x, lora[at]), lora[at + 1]) for at in (0, 2))
    return first + low * SCALING, second, third - other * SCALING


def inputs_with_adapters(*shape, dtype=torch.float32, adapter=None):
    adapter, width = adapter or dtype, shape[-1]
    sizes = [(4, width, width**-0.5), (24, 4, 0.5), (2, width, width**-0.5), (9, 2, 0.5)]
    lora = [draw(*size, seed=20 + i, scale=scale, dtype=adapter) for i, (*size, scale) in enumerate(sizes)]
    return *inputs(*shape, dtype=dtype), *lora


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_with_adapters_is_that_of_peft(shape, dtype, products):
    check_errors(with_adapters, peft, peft, inputs_with_adapters(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_with_adapters_are_those_of_the_layers_alone(shape, dtype, products):
    given = inputs_with_adapters(*shape, dtype=dtype)
    expected = list(one_by_one(*given))
    if products and dtype == torch.float32 and shape[:-1] != (1, 1):
        expected[1] = linear(given[0], given[2])
    for got, alone in zip(with_adapters(*given), expected, strict=True):
        assert torch.equal(got, alone) and got.is_contiguous()


def test_sums_with_adapters_are_within_the_products(products):
    """Of x: a product a layer, and one of all adapters, of which the first writes and the others add."""
    given = inputs_with_adapters(2, 65, 96)
    for tensor in given[1:5]:
        tensor.requires_grad_(False)
    made = with_adapters(*given)
    with SeenOperators() as seen:
        torch.autograd.backward(made, [torch.ones_like(out) for out in made])
    assert not [name for name in seen.names if name.startswith("aten::add.")]
    counted = [
        sum(name.startswith(op) for name in seen.names) for op in ("trl_fast::product", "aten::mm", "aten::addmm")
    ]
    # By x as above; then by what each A gives and by each B, and by both A at once.
    assert counted == ([4 + 2 * 2 + 1, 0, 0] if products else [0, 1 + 2 * 2 + 1, 3])


def test_what_backward_keeps_with_adapters(products):
    """x once, and two results of rank 4 and 2; without a trained A no x."""
    for trains, kept in (((0, 5, 6, 7, 8), [20, 4, 2]), ((0, 6, 8), [4, 2])):
        given = inputs_with_adapters(3, 7, 20)
        for i, tensor in enumerate(given):
            tensor.requires_grad_(i in trains)
        weights, saved = {tensor.data_ptr() for tensor in given[1:]}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            with_adapters(*given)
        assert [t.shape[-1] for t in saved if t.data_ptr() not in weights] == kept


@pytest.mark.parametrize("trained", [(0,), (5, 6, 7, 8), (0, 5, 6, 7, 8), (1, 3), (5,), (8,), (0, 7)], ids=str)
def test_only_what_trains_gets_a_gradient_with_adapters(trained, products):
    given = inputs_with_adapters(3, 7, 20)
    expected = results(peft, given)[3:]
    for i, tensor in enumerate(given):
        tensor.requires_grad_(i in trained)
    made = with_adapters(*given)
    grads = [draw(*o.shape, seed=7 + i, dtype=torch.bfloat16).detach().float() for i, o in enumerate(made)]
    torch.autograd.backward(made, grads)
    for i, (tensor, right) in enumerate(zip(given, expected, strict=True)):
        assert (tensor.grad is not None) is (i in trained)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, right)
            assert tensor.grad.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_results_with_adapters_that_nothing_follows(used):
    given = [tensor.detach().double().requires_grad_() for tensor in inputs_with_adapters(5, 20)]
    got, right = (sum(f(*given)[i].square().sum() for i in used) for f in (with_adapters, peft))
    grads = [torch.autograd.grad(loss, given, allow_unused=True) for loss in (got, right)]
    assert [grad is None for grad in grads[0]] == [grad is None for grad in grads[1]]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_under_autocast(dtype):
    """In float32, as PEFT makes them; x is cast once for all."""
    given = inputs_with_adapters(3, 7, 20, dtype=dtype, adapter=torch.float32)
    given[0].data = given[0].data.float()
    saved: dict[int, int] = {}

    def run(function):
        def under_autocast(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*tensors)

        return under_autocast

    check_errors(run(with_adapters), run(peft), peft, given)
    assert all(map(torch.equal, run(with_adapters)(*given), run(one_by_one)(*given)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        run(with_adapters)(*given)
    assert list(saved.values()).count(2 * given[0].numel()) == 1 and 4 * given[0].numel() not in saved.values()


@pytest.mark.parametrize(
    ("place", "change"),
    [(5, lambda t: t[:, 1:]), (6, lambda t: t[1:]), (7, lambda t: t.half()), (8, lambda t: t[:, :1])],
)
def test_bad_adapters(place, change):
    given = [change(t) if i == place else t for i, t in enumerate(inputs_with_adapters(5, 20))]
    with pytest.raises(ValueError, match="^adapters: expected"):
        with_adapters(*given)


def test_as_many_of_each():
    x, weight, *_ = inputs(5, 20)
    for biases, adapters in (([], None), ([None], []), ([None], [None, None])):
        with pytest.raises(ValueError, match="as many biases and adapters as weights"):
            joint_linear(x, [weight], biases, adapters)
