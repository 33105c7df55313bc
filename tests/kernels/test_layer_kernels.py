"""Tests the Triton kernels of layers: in the interpreter, and what they compile to."""

import importlib
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernel_report import compile_kernel, resources
from benchmarks.layer_kernel_cases import LAYER_KERNELS
from support import layer_errors
from support import layer_kernels as checks
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import layer_kernels, rotary_kernels
from trl_fast.kernels.shared_constants import ACTIVATIONS, NORM_CASTS, PAIRS
from trl_fast.ops.layers import (
    chunked_gated_activation,
    gated_activation,
    qk_norm_rotary,
    residual_rms_norm,
    rms_norm,
    rotary,
)
from trl_fast.ops.layers import kernels as layer_ops

# The package has a function of that name.
embedding = importlib.import_module("trl_fast.ops.layers.embedding")

pytestmark = pytest.mark.gpu_code


@pytest.fixture
def kernels():
    with interpreted_kernels():
        yield SimpleNamespace(**{**vars(layer_kernels), **vars(rotary_kernels)})


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*checks.NORM_SHAPES, (2, 16384)], ids=str)
def test_norms(kernels, shape, dtype):
    for cast in NORM_CASTS:
        checks.check_norm(kernels, shape, dtype, cast)
    checks.check_norm(kernels, shape, dtype, "llama", has_weight=False)
    checks.check_residual_norm(kernels, shape, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # e^100: the sigmoid is 0
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations(kernels, name, dtype):
    for shape in ((1, 9), (1, 2500), (5, 1001)):
        checks.check_gate(kernels, shape, dtype, name, halves=False)
        checks.check_gate(kernels, shape, dtype, name, halves=True)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
def test_rotations(kernels, pairs, dtype):
    for shape in checks.HEAD_SHAPES:
        for one_angle, upcast in ((False, False), (True, False), (False, True)):
            checks.check_rotary(kernels, shape, dtype, pairs, one_angle=one_angle, upcast=upcast)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("cast", NORM_CASTS)
def test_norms_and_rotations(kernels, cast, dtype):
    for shape in checks.HEAD_SHAPES:
        for pairs in PAIRS:
            upcast = shape[0] == 2
            checks.check_norm_rotary(kernels, shape, dtype, cast, pairs, one_angle=not upcast, upcast=upcast)


OPS = {
    "rms_norm": (lambda x, w, **way: rms_norm(x[0], w, 1e-6, **way), 1),
    "residual_rms_norm": (lambda x, w, **way: residual_rms_norm(x[0], x[1], w, 1e-6, cast="gemma", **way), 1),
    "gated_activation": (lambda x, w, **way: gated_activation(x[0], x[1] * w, "gelu", **way), 1),
    "chunked_gated_activation": (lambda x, w, **way: chunked_gated_activation(x[0] * w, **way), 1),
    "rotary": (lambda x, w, **way: rotary(x[:, :1] * w, x[:, 1:], *ANGLES, **way), 1),
    "qk_norm_rotary": (lambda x, w, **way: qk_norm_rotary(x[:, :1], x[:, 1:], w, w, 1e-6, *ANGLES, **way), 1),
    "a norm of all heads": (lambda x, w, **way: qk_norm_rotary(x, x, w, w, 1e-6, *ANGLES, **way), 3),
}
ANGLES = checks.draw(2, 1, 5, 8, dtype=torch.float32).unbind()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", OPS)
def test_ops_run_by_the_kernels(name):
    function, heads = OPS[name]
    given = [layer_errors.draw(2, 3, 5, 8), layer_errors.draw(8 * heads, seed=1)]
    calls = []
    real = layer_ops.layer_kernel
    with pytest.MonkeyPatch.context() as patch:
        for module in (m for key, m in sys.modules.items() if key.startswith("trl_fast.ops.layers.")):
            if hasattr(module, "layer_kernel"):
                patch.setattr(module, "layer_kernel", lambda *asked: (calls.append(asked), real(*asked))[1])
        ours = layer_errors.results(lambda *args: function(*args, backend="triton"), given)
    twins = layer_errors.results(lambda *args: function(*args, backend="torch"), given)
    for got, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(got, twin, rtol=1e-5, atol=1e-5)
    assert calls and all(backend == "triton" for _, backend in calls)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_gradients_of_equal_tokens_are_summed_once(adds, dtype):
    """Tokens that come once, and one that comes more often than a program has rows; other rows are left alone."""
    ids = torch.tensor([5, 2, 9, *[7] * 19, 2, 0])
    for width in (3, 600):
        grad, before = checks.draw(len(ids), width, dtype=dtype), checks.draw(11, width, dtype=dtype, seed=1)
        exact = (before.double() if adds else torch.zeros(11, width).double()).index_add(0, ids, grad.double())
        sums = [torch.zeros(width) for _ in range(11)]
        for token, row in zip(ids, grad, strict=True):
            sums[token] = sums[token] + row.float()
        total = before.clone()
        if adds:
            embedding._ADD["triton"](total, grad, ids)
        else:
            total = embedding._SUM["triton"](grad, ids, 11)
        twin = ((before.float() if adds else 0) + torch.stack(sums)).to(dtype)
        checks.hold(total, twin, exact)
        untouched = [1, 3, 4, 6, 8, 10]
        assert torch.equal(total[untouched], before[untouched] if adds else torch.zeros(6, width).to(dtype))
    embedding._ADD["triton"](total, grad[:0], ids[:0])


def test_no_rows(kernels):
    checks.check_nothing(kernels)


def test_offsets_beyond_32_bits(kernels):
    """Three rows, 2³⁰ elements apart; only the pages that are touched take memory."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    rows, x = far.as_strided((3, 64), (2**30, 1)), checks.draw(3, 64, dtype=torch.bfloat16)
    rows.copy_(x)
    there, dense = (checks.poisoned((3, 64), torch.bfloat16) for _ in range(2))
    rstd = torch.empty(3)
    kernels.rms_norm(rows, None, None, checks.EPS, 0, there, None, rstd)
    kernels.rms_norm(x, None, None, checks.EPS, 0, dense, None, rstd)
    assert torch.equal(there, dense)
    kernels.gated_activation(rows, rows, 0, there)
    kernels.gated_activation(x, x, 0, dense)
    assert torch.equal(there, dense)
    heads = far.as_strided((1, 1, 3, 64), (0, 0, 2**30, 1))
    way = (torch.ones(1, 3, 64).bfloat16(), torch.ones(1, 3, 64).bfloat16(), 0, False, False)
    kernels.rotary(heads, *way, False, there[None, None])
    kernels.rotary(x[None, None], *way, False, dense[None, None])
    assert torch.equal(there, dense)


def test_gates_short_of_2_31_have_all_their_blocks(monkeypatch):
    """As one row of 2³¹ − 8 columns, to which a kernel could not add a block's in 32 bits."""
    launched = []
    for name in ("gate_kernel", "gate_backward_kernel"):
        kernel = getattr(layer_kernels, name)

        def launch(*args, grid, names=kernel.arg_names, **options):
            launched.append((grid, dict(zip(names, args, strict=False))))

        stub = type("Kernel", (), {"__getitem__": lambda self, grid, launch=launch: partial(launch, grid=grid)})()
        monkeypatch.setattr(layer_kernels, name, stub)
    x = torch.empty(2**28 - 1, 8, dtype=torch.bfloat16, device="meta")
    layer_kernels.gated_activation(x, x, 0, x)
    layer_kernels.gated_activation_backward(x, x, x, 0, x, x)
    for grid, given in launched:
        assert given["num_columns"] == 2**31 - 8
        assert grid == (2**20,) and given["blocks"] == 2**20
    assert len(launched) == 2


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        pytest.param(kernel, target, marks=() if target == 90 else pytest.mark.slow)
        for kernel in LAYER_KERNELS
        for target in kernel.targets
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_compiles_without_spills_and_moves_no_byte_of_a_row_twice(kernel, target):
    found = resources(compile_kernel(kernel, target), kernel.num_warps, target, kernel.scalar_loads)
    # And a few numbers a row.
    most = kernel.least_bytes + kernel.cached_bytes + 12
    assert found.spill_bytes == 0 and kernel.least_bytes <= found.streamed_bytes <= most, found
