"""Tests the CUDA kernels of layers, compiled as host C++: against PyTorch and float64, and under sanitizers."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from support import layer_kernels as checks
from support.host_kernels import DTYPES, run_sanitized
from support.targets import QUICK_TARGETS
from trl_fast.kernels.shared_constants import ACTIVATIONS, NORM_CASTS, PAIRS

pytestmark = pytest.mark.gpu_code


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of csrc/layer_types.h, its fields in order: *pointer, integer, ~float, %int, ?bool, [n]integers."""
    kinds = {"*": ctypes.c_void_p, "~": ctypes.c_float, "%": ctypes.c_int, "?": ctypes.c_bool}
    named = []
    for field in fields.split():
        kind = kinds.get(field[0], ctypes.c_int64)
        if field[0].isdigit():
            kind = ctypes.c_int64 * int(field[0])
        named.append((field.lstrip("*~%?0123456789"), kind))
    return type(name, (ctypes.Structure,), {"_fields_": named})


Rows = structure("Rows", "*data 2sizes 3strides")
NormWeight = structure("NormWeight", "*data %dtype %cast columns")
Turns = structure(
    "Turns", "*cos *sin 2cos_strides 2sin_strides %dtype ?one_angle_a_pair ?upcast %pairs width ?is_backward"
)
Heads = structure("Heads", "*x 3x_strides %dtype heads tokens width")
GateArgs = structure(
    "GateArgs", "*gate *up stride columns %dtype %activation *out *grad *grad_gate *grad_up grad_stride"
)


class NormArgs(ctypes.Structure):
    _fields_ = [
        ("weight", NormWeight),
        ("x", Rows),
        ("residual", Rows),
        ("eps", ctypes.c_float),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rstd", "sum", "out")),
        ("grad", Rows),
        ("grad_sum", Rows),
        ("partials", ctypes.c_void_p),
    ]


class RotaryArgs(ctypes.Structure):
    _fields_ = [("heads", Heads), ("turns", Turns), ("out", ctypes.c_void_p)]


class NormRotaryArgs(ctypes.Structure):
    _fields_ = [
        ("heads", Heads),
        ("turns", Turns),
        ("norm", NormWeight),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("rstd", "out", "grad")),
        ("grad_strides", ctypes.c_int64 * 3),
        ("partials", ctypes.c_void_p),
    ]


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows_of(tensor: torch.Tensor | None) -> ctypes.Structure:
    """Rows of a tensor of up to four dimensions."""
    if tensor is None:
        return Rows(None, (1, 1), (0, 0, 0))
    sizes, strides = [1, 1, 1, *tensor.shape[:-1]][-3:], [0, 0, 0, *tensor.stride()[:-1]][-3:]
    return Rows(tensor.data_ptr(), tuple(sizes[1:]), tuple(strides))


def turns_of(cos, sin, pairs, one_angle, upcast, is_backward) -> ctypes.Structure:
    strides = [(0 if t.shape[0] == 1 else t.stride(0), t.stride(1)) for t in (cos, sin)]
    width = cos.shape[2] * (2 if one_angle else 1)
    return Turns(address(cos), address(sin), *strides, DTYPES[cos.dtype], one_angle, upcast, pairs, width, is_backward)


def heads_of(x) -> ctypes.Structure:
    return Heads(address(x), x.stride()[:3], DTYPES[x.dtype], x.shape[1], x.shape[2], x.shape[3])


class HostKernels:
    """The kernels' simulation, with the signatures of the Triton launchers; each call shuffles the threads anew."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.calls = 0

    def _run(self, name: str, args: ctypes.Structure, *sizes: int) -> None:
        self.calls += 1
        getattr(self.library, name)(ctypes.byref(args), *map(ctypes.c_int64, sizes), ctypes.c_uint(self.calls))

    @staticmethod
    def _norm(x, residual, weight, eps, cast, out, total, rstd, grad=None, grad_sum=None, partials=None) -> NormArgs:
        weights = NormWeight(address(weight), DTYPES[x.dtype], cast, x.shape[-1])
        rows = x.numel() // x.shape[-1]
        outs, grads = map(address, (rstd, total, out)), map(rows_of, (grad, grad_sum))
        return NormArgs(weights, rows_of(x), rows_of(residual), eps, rows, *outs, *grads, address(partials))

    def rms_norm(self, *given) -> None:
        self._run("simt_rms_norm", self._norm(*given))

    def rms_norm_backward(self, grad, grad_sum, x, weight, rstd, cast, grad_x, partials) -> None:
        args = self._norm(x, None, weight, 0.0, cast, grad_x, None, rstd, grad, grad_sum, partials)
        self._run("simt_rms_norm_backward", args, args.rows if partials is None else len(partials))

    def gated_activation(self, gate, up, activation, out) -> None:
        args = GateArgs(address(gate), address(up), gate.stride(0), gate.shape[1], DTYPES[gate.dtype], activation)
        args.out = address(out)
        self._run("simt_gated_activation", args, len(gate))

    def gated_activation_backward(self, grad, gate, up, activation, grad_gate, grad_up) -> None:
        args = GateArgs(address(gate), address(up), gate.stride(0), gate.shape[1], DTYPES[gate.dtype], activation)
        args.grad, args.grad_gate, args.grad_up = map(address, (grad, grad_gate, grad_up))
        args.grad_stride = grad_gate.stride(0)
        self._run("simt_gated_activation_backward", args, len(gate))

    def rotary(self, x, *way) -> None:
        *turns, out = way
        args = RotaryArgs(heads_of(x), turns_of(*turns), address(out))
        self._run("simt_rotary", args, x.numel() // x.shape[3])

    @staticmethod
    def _norm_rotary(x, weight, eps, cast, turns, rstd, out) -> NormRotaryArgs:
        norm = NormWeight(address(weight), DTYPES[x.dtype], cast, x.shape[3])
        return NormRotaryArgs(heads_of(x), turns, norm, eps, address(rstd), address(out))

    def norm_rotary(self, x, weight, eps, cast, *way) -> None:
        *turns, out, rstd = way
        args = self._norm_rotary(x, weight, eps, cast, turns_of(*turns, False), rstd, out)
        self._run("simt_norm_rotary", args, x.numel() // x.shape[3])

    def norm_rotary_backward(self, grad, x, weight, rstd, cast, *way) -> None:
        *turns, grad_x, partials = way
        args = self._norm_rotary(x, weight, 0.0, cast, turns_of(*turns, True), rstd, grad_x)
        args.grad, args.grad_strides, args.partials = address(grad), grad.stride()[:3], address(partials)
        rows = x.numel() // x.shape[3]
        self._run("simt_norm_rotary_backward", args, rows, rows if partials is None else len(partials))


@pytest.fixture(scope="module")
def kernels(compile_host) -> HostKernels:
    return HostKernels(compile_host("layer_kernels_simt.cpp", "-shared", "-fPIC"))


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*checks.NORM_SHAPES, (2, 16387), (2, 17408)], ids=str)
def test_norms(kernels, shape, dtype):
    for cast in NORM_CASTS:
        checks.check_norm(kernels, shape, dtype, cast)
    checks.check_norm(kernels, shape, dtype, "llama", has_weight=False)
    checks.check_residual_norm(kernels, shape, dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations(kernels, name, dtype):
    for shape, halves in itertools.product(((1, 9), (1, 2500), (3, 640), (5, 1001)), (False, True)):
        checks.check_gate(kernels, shape, dtype, name, halves=halves)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
def test_rotations(kernels, pairs, dtype):
    for shape, one_angle, upcast in itertools.product(checks.HEAD_SHAPES, (False, True), (False, True)):
        checks.check_rotary(kernels, shape, dtype, pairs, one_angle=one_angle, upcast=upcast)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("cast", NORM_CASTS)
def test_norms_and_rotations(kernels, cast, dtype):
    for shape, pairs in itertools.product((*checks.HEAD_SHAPES, (1, 1, 3, 640, 320)), PAIRS):
        upcast = shape[0] == 2
        checks.check_norm_rotary(kernels, shape, dtype, cast, pairs, one_angle=not upcast, upcast=upcast)


def test_no_rows(kernels):
    checks.check_nothing(kernels)


def test_rows_in_three_dimensions_are_read_where_they_lie(kernels):
    x = checks.draw(3, 5, 4, 2, 64, dtype=torch.float32)[..., 0, :].transpose(0, 2)
    out, rstd = torch.empty(4, 5, 3, 64), torch.empty(60)
    kernels.rms_norm(x, None, None, checks.EPS, 0, out, None, rstd)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (64,), eps=checks.EPS))


def behind(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that lies one number behind a multiple of sixteen bytes."""
    room = tensor.new_empty(tensor.numel() + 1)
    assert room.data_ptr() % 16 == 0
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("misplaced", ["draw", "poisoned"])
def test_rows_that_begin_anywhere_are_read_and_written_number_by_number(
    compile_host, misplaced, dtype, monkeypatch, capfd
):
    """Widths are those of whole packs; what is read, or what is written, does not begin where packs do."""
    misaligned = HostKernels(compile_host("layer_kernels_simt.cpp", "-shared", "-fPIC", "-fsanitize=alignment"))
    right = getattr(checks, misplaced)
    monkeypatch.setattr(checks, misplaced, lambda *given, **more: behind(right(*given, **more)))
    for shape in ((5, 128), (2, 4096)):
        checks.check_norm(misaligned, shape, dtype, "llama")
        checks.check_residual_norm(misaligned, shape, dtype)
        checks.check_gate(misaligned, shape, dtype, "silu", halves=False)
        checks.check_gate(misaligned, shape, dtype, "silu", halves=True)
    for pairs in PAIRS:
        checks.check_rotary(misaligned, (2, 3, 5, 64, 32), dtype, pairs, one_angle=False, upcast=False)
        checks.check_norm_rotary(misaligned, (2, 3, 5, 64, 32), dtype, "gemma", pairs, one_angle=True, upcast=True)
    assert "misaligned" not in capfd.readouterr().err


@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_compiled_kernels_do_not_spill_and_move_sixteen_bytes_at_once(target):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    for kernel in (k for name in ("layer_*.cu", "rotary_*.cu") for k in compile_cuda_kernels(nvcc, target, name)):
        found = kernel.resources
        assert found.spill_bytes == 0, kernel.label
        if kernel.shown:
            assert found.vector_loads and found.vector_stores, kernel.label
        if kernel.shown and kernel.label.startswith("gate"):
            # Two tensors read and one written; backward three and two.
            accesses = (found.vector_loads, found.vector_stores, found.narrow_loads, found.narrow_stores)
            assert accesses == ((3, 2, 0, 0) if "backward" in kernel.label else (2, 1, 0, 0))


@pytest.mark.slow
def test_no_races_and_a_missing_barrier_is_found(compile_host):
    clean = run_sanitized(compile_host("layer_kernels_sanitized.cpp", "-fsanitize=thread"), "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    plant = "-DTRL_FAST_PLANT_MISSING_BARRIER"
    broken = run_sanitized(compile_host("layer_kernels_sanitized.cpp", "-fsanitize=thread", plant), "clean")
    assert broken.returncode != 0 and "data race" in broken.stderr, broken.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["norm", "gate", "rotary", "norm_rotary"])
def test_no_access_out_of_bounds_and_a_planted_one_is_found(compile_host, what):
    program = compile_host("layer_kernels_sanitized.cpp", "-fsanitize=address", "-fsanitize-sections=simt_shared")
    clean = run_sanitized(program, "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    broken = run_sanitized(program, what)
    assert broken.returncode != 0 and "heap-buffer-overflow" in broken.stderr, broken.stderr[:4000]
