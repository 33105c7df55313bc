"""Layers' ops whose backward passes are in C++: the bits of Python's, on what they are to serve and nothing else."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.layer_errors import DTYPES, draw
from support.seen_operators import SeenOperators
from trl_fast.modeling.selective_checkpointing import Budget, SavingMode
from trl_fast.ops import device, eager_ops
from trl_fast.ops.device import OWN_PRODUCTS, real_facts
from trl_fast.ops.layers import (
    Adapter,
    chunked_gated_activation,
    gated_activation,
    joint_linear,
    lora_linear,
    norm_and_residual,
    qk_norm_rotary,
    residual_rms_norm,
    rms_norm,
    rotary,
)

EPS = 1e-6
NAMES = ("rms_norm", "residual_rms_norm", "gated_activation", "chunked_gated_activation", "rotary", "qk_norm_rotary")
PYTHONS = {f"trl_fast::{name}{direction}" for name in (*NAMES, "lora_linear") for direction in ("", "_backward")}
ANGLES = draw(2, 7, 16, seed=9, scale=3.0).detach()


def turned(query, key, *, angles=ANGLES, **way):
    return rotary(query, key, angles.cos().to(query.dtype), angles.sin().to(query.dtype), **way)


def turned_norms(query, key, query_weight, key_weight, **way):
    cos, sin = ANGLES.cos().to(query.dtype), ANGLES.sin().to(query.dtype)
    return qk_norm_rotary(query, key, query_weight, key_weight, EPS, cos, sin, **way)


def of_layers(tensor):
    """Returns heads as layers make them: a view of (B, T, heads, D)."""
    return tensor.transpose(1, 2)


def columns_first(tensor):
    """Returns the same numbers with the last dimension not in one piece."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def layers_of_one_input(x, first, second, bias, a, b):
    return joint_linear(x, (first, second, first), (None, bias, None), (Adapter(a, b, 1.5), None, Adapter(a, b, -2.0)))


HEADS = [(2, 7, 4, 16), (2, 7, 2, 16)]
# What is called, and the shapes of what it is given.
CASES = {
    "norm": (lambda x, w: rms_norm(x, w, EPS), [(2, 70, 20), (20,)]),
    "norm, gemma": (lambda x, w: rms_norm(x, w, EPS, cast="gemma"), [(70, 20), (20,)]),
    "norm without a weight": (lambda x: rms_norm(x, None, EPS), [(70, 20)]),
    "norm of views": (lambda x, w: rms_norm(columns_first(x)[:, ::2], w, EPS, cast="olmo"), [(2, 70, 20), (20,)]),
    "norm of large rows": (lambda x, w: rms_norm(x, w, EPS), [(1100, 2048), (2048,)]),
    "norm of no rows": (lambda x, w: rms_norm(x, w, EPS), [(0, 20), (20,)]),
    "residual": (lambda x, r, w: residual_rms_norm(x, r, w, EPS), [(2, 70, 20), (2, 70, 20), (20,)]),
    "residual without a weight": (lambda x, r: residual_rms_norm(x, r, None, EPS), [(70, 20), (70, 20)]),
    "norm beside": (lambda x, w: norm_and_residual(x, w, EPS), [(2, 70, 20), (20,)]),
    "gate": (gated_activation, [(2, 5, 24), (2, 5, 24)]),
    "gate of views": (lambda a, b: gated_activation(columns_first(a), b, "gelu"), [(2, 5, 24), (2, 5, 24)]),
    "gate of nothing": (gated_activation, [(0, 24), (0, 24)]),
    "gate of numbers": (lambda a, b: gated_activation(a[0], b[0]), [(1,), (1,)]),
    "halves": (lambda x: chunked_gated_activation(x, "gelu_tanh"), [(2, 5, 48)]),
    "rotation": (lambda q, k: turned(of_layers(q), of_layers(k)), HEADS),
    "rotation of queries alone": (lambda q: turned(of_layers(q), None, pairs="adjacent")[0], HEADS[:1]),
    "rotation in float32": (lambda q, k: turned(of_layers(q), of_layers(k), upcast=True), HEADS),
    "rotation, an angle a pair": (
        lambda q, k: turned(of_layers(q), of_layers(k), angles=ANGLES[..., :8], one_angle_a_pair=True),
        HEADS,
    ),
    "rotation of views": (lambda q, k: turned(columns_first(of_layers(q)), columns_first(of_layers(k))), HEADS),
    "norm and rotation": (lambda *given: turned_norms(*map(of_layers, given[:2]), *given[2:]), [*HEADS, (16,), (16,)]),
    "norm of all heads and rotation": (
        lambda *given: turned_norms(*map(of_layers, given[:2]), *given[2:], cast="olmo"),
        [*HEADS, (64,), (32,)],
    ),
    "layers of one input": (lambda x, v, w: joint_linear(x, (v, w), (None, None)), [(2, 7, 20), (24, 20), (9, 20)]),
    "layers of one input of views": (
        lambda x, v, b: joint_linear(columns_first(x)[:, ::2], (v, v[::2]), (b, b[::2])),
        [(2, 70, 20), (24, 20), (24,)],
    ),
    "layers of one input, with adapters": (
        layers_of_one_input,
        [(2, 7, 20), (24, 20), (9, 20), (9,), (3, 20), (24, 3)],
    ),
    "a layer with an adapter": (
        lambda x, w, bias, a, b: lora_linear(x, w, bias, a, b, 1.5),
        [(2, 7, 20), (24, 20), (24,), (3, 20), (24, 3)],
    ),
    "a layer of large results with an adapter": (
        lambda x, w, a, b: lora_linear(x, w, None, a, b, 1.5),
        [(1100, 32), (2048, 32), (3, 32), (2048, 3)],
    ),
    "layers of no rows": (lambda x, v, w: joint_linear(x, (v, w), (None, None)), [(0, 20), (24, 20), (9, 20)]),
}


def results(run, given, frozen=()):
    """Returns results and gradients, None for what is frozen."""
    leaves = [tensor.detach().clone().requires_grad_(i not in frozen) for i, tensor in enumerate(given)]
    outs = run(*leaves)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    if any(leaf.requires_grad for leaf in leaves):
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    return [*outs, *(leaf.grad for leaf in leaves)]


@pytest.fixture(autouse=True)
def atens_products(monkeypatch):
    """Products of linear layers are ATen's, whatever the CPU."""
    monkeypatch.setenv(OWN_PRODUCTS, "0")
    forget_device()
    yield
    monkeypatch.undo()
    forget_device()


def forget_device():
    device.known_facts.clear()
    for settled in (eager_ops._eager_op, eager_ops._eager_linear):
        settled.cache_clear()


@pytest.fixture
def in_python(monkeypatch):
    """Returns a function that runs another one by Python's ops."""

    def run(function, *given):
        with monkeypatch.context() as patch:
            for name, module in [*sys.modules.items()]:
                for choice in ("eager_op", "eager_linear"):
                    if name.startswith("trl_fast.ops.layers.") and hasattr(module, choice):
                        patch.setattr(module, choice, lambda *_: None)
            return function(*given)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_pythons_ops(case, dtype, in_python):
    run, shapes = CASES[case]
    given = [draw(*shape, seed=i, dtype=dtype).detach() for i, shape in enumerate(shapes)]
    for frozen in ((), *([i] for i in range(len(given))), [*range(len(given))]):
        torch.manual_seed(0)
        with SeenOperators() as seen:
            got = results(run, given, frozen)
        torch.manual_seed(0)
        expected = in_python(results, run, given, frozen)
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
                assert ours.stride() == theirs.stride()
        # Python's ops are seen as wholes, these as the kernels that they call. CPUs have no products of float16, and
        # some none of bfloat16.
        expected_pythons = real_facts(given[0].device).product_dtypes.get(dtype, dtype) != dtype and "adapter" in case
        assert seen.names and bool([name for name in seen.names if name in PYTHONS]) is expected_pythons


@pytest.mark.parametrize("case", [case for case in CASES if "views" not in case])
def test_a_second_derivative_is_refused_by_name(case):
    run, shapes = CASES[case]
    given = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    outs = run(*given)
    with pytest.raises(RuntimeError, match=r"\w+ has no second derivative: create_graph=True"):
        torch.autograd.grad(
            [out.sum() for out in ([outs] if isinstance(outs, torch.Tensor) else outs)], given, create_graph=True
        )


@pytest.mark.parametrize("case", CASES)
def test_without_gradients(case):
    run, shapes = CASES[case]
    given = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = run(*given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = run(*given)
        for ours, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
            # A view of what needs a gradient needs one itself.
            assert torch.equal(ours, theirs) and (ours._is_view() or not ours.requires_grad)


def test_who_looks_at_ops_as_wholes_gets_pythons():
    with FakeTensorMode() as fake, SeenOperators() as seen:
        rms_norm(fake.from_tensor(torch.ones(3, 8)), fake.from_tensor(torch.ones(8)), EPS)
    assert "trl_fast::rms_norm" in seen.names
    # torch's ops in Python have no functional transforms either, but say so.
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vjp(lambda x: rms_norm(x, torch.ones(8), EPS), torch.ones(3, 8))


def test_a_forced_backend_is_taken():
    with SeenOperators() as seen:
        rms_norm(torch.ones(3, 8), torch.ones(8), EPS, backend="torch")
    assert "trl_fast::rms_norm" in seen.names
    with pytest.raises(RuntimeError, match="'cuda' was forced for rms_norm"):
        rms_norm(torch.ones(3, 8), torch.ones(8), EPS, backend="cuda")


def test_products_of_another_dtype_are_pythons():
    """A CPU multiplies float16 in float32, of which ATen knows nothing."""
    x, weight = torch.ones(3, 8, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16)
    assert eager_ops.eager_linear("joint_linear", x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert (eager_ops.eager_linear("joint_linear", x) is None) is (
            torch.bfloat16 in real_facts(x.device).product_dtypes
        )
    assert torch.equal(joint_linear(x, [weight], [None])[0], torch.full((3, 4), 8.0, dtype=torch.float16))


def test_checkpointing_keeps_the_result_of_a_layer_with_an_adapter():
    given = [draw(*shape, seed=i) for i, shape in enumerate([(2, 7, 20), (24, 20), (3, 20), (24, 3)])]
    with SavingMode(Budget(1 << 20, 1)) as mode:
        lora_linear(given[0], given[1], None, *given[2:], 1.5).sum()
        lora_linear(given[0], given[1], None, *given[2:], 1.5)
    assert mode.results[0].op is torch.ops.trl_fast.lora_product.default
    assert [tensor.shape for tensor in mode.results[0].tensors] == [(2, 7, 24), (14, 3)]


def test_errors_are_those_of_the_ops():
    for bad in (torch.ones(7), torch.ones(8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="^weight: expected torch.float32 of shape"):
            rms_norm(torch.ones(3, 8), bad, EPS)
