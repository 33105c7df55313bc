"""Calls the CUDA row kernels, compiled as host C++ (tests/csrc/*_simt.cpp), from Python."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LogitTile(ctypes.Structure):
    """Mirrors trl_fast::LogitTile; the structures here are those of csrc/row_types.h, field by field."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("row_stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("column_offset", ctypes.c_int64),
    ]


class Transform(ctypes.Structure):
    _fields_ = [
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("inv_temperature", ctypes.c_float),
    ]


class ScoreArgs(ctypes.Structure):
    _fields_ = [
        ("tile", LogitTile),
        ("transform", Transform),
        ("outputs", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("state_stride", ctypes.c_int64),
        # Null: the CUDA kernels do not give weights.
        ("weights", ctypes.c_void_p),
        ("weights_stride", ctypes.c_int64),
    ]


class GradArgs(ctypes.Structure):
    _fields_ = [
        ("tile", LogitTile),
        ("transform", Transform),
        ("lse", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("coefficient_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("out_dtype", ctypes.c_int),
    ]


class PackedRows(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p),
        ("tops", ctypes.c_void_p),
        ("words_stride", ctypes.c_int64),
        ("tops_stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
    ]


class DivergenceSide(ctypes.Structure):
    """Mirrors trl_fast::DivergenceSide; the divergence's structures are those of csrc/divergence_types.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("row_stride", ctypes.c_int64),
        ("transform", Transform),
    ]


class DivergenceNumbers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("teacher_part", "student_part", "mixture", "one_minus_mixture", "tilt")),
        ("is_tvd", ctypes.c_bool),
    ]


class DivergenceArgs(ctypes.Structure):
    _fields_ = [
        ("student", DivergenceSide),
        ("teacher", DivergenceSide),
        ("columns", ctypes.c_int64),
        ("numbers", DivergenceNumbers),
        ("weights", ctypes.c_void_p),
        ("results", ctypes.c_void_p),
        ("results_stride", ctypes.c_int64),
        ("gradient", ctypes.c_void_p),
        ("gradient_stride", ctypes.c_int64),
        ("gradient_dtype", ctypes.c_int),
    ]


def run_sanitized(program: Path, what: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of tests/csrc, compiled with a sanitizer; what: the defect that it plants, "clean" for none."""
    command = [str(program), what]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unexpected memory mapping" in result.stderr:  # older sanitizers cannot live with much address randomisation
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=60)
    return result


class HostDivergence:
    """The simulation of the divergence's kernel; each call shuffles the threads anew."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.calls = 0

    @staticmethod
    def _side(logits, bias, scale, softcap, inv_temperature) -> DivergenceSide:
        assert bias is None or (bias.is_contiguous() and bias.dtype == torch.float32)
        transform = Transform(None if bias is None else bias.data_ptr(), scale, softcap, inv_temperature)
        return DivergenceSide(logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), transform)

    def __call__(self, *given) -> None:
        """Computes the rows; the arguments are those of row_divergence_reference."""
        student, teacher, (inv_temperature, *formula, weights, results, gradient) = given[:4], given[4:8], given[8:]
        teacher_part, student_part, mixture, is_tvd = formula
        assert weights.is_contiguous() and student[0].dtype == torch.float32
        rest = 1 - mixture
        tilt = teacher_part * rest - student_part * mixture
        to = (None, 0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0), DTYPES[gradient.dtype])
        args = DivergenceArgs(
            *(self._side(*student, inv_temperature), self._side(*teacher, inv_temperature), student[0].shape[1]),
            DivergenceNumbers(teacher_part, student_part, mixture, rest, tilt, is_tvd),
            *(weights.data_ptr(), results.data_ptr(), results.stride(0), *to),
        )
        self.calls += 1
        rows = ctypes.c_int64(len(student[0]))
        self.library.simt_row_divergence(ctypes.byref(args), rows, ctypes.c_uint(self.calls))


class HostKernels:
    """The kernels' simulation, with the signatures of the references; each call shuffles the threads anew."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.calls = 0

    def _run(self, name: str, rows: int, *args: ctypes.Structure) -> None:
        self.calls += 1
        given = map(ctypes.byref, args)
        getattr(self.library, name)(*given, ctypes.c_int64(rows), ctypes.c_uint(self.calls))

    @staticmethod
    def _inputs(logits, targets, bias, scale, softcap, inv_temperature, column_offset) -> tuple[LogitTile, Transform]:
        rows, columns = logits.shape
        tile = LogitTile(
            logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), columns, targets.data_ptr(), column_offset
        )
        assert targets.is_contiguous() and (bias is None or (bias.is_contiguous() and bias.dtype == torch.float32))
        return tile, Transform(None if bias is None else bias.data_ptr(), scale, softcap, inv_temperature)

    def scores(self, logits, targets, bias, *rest) -> None:
        *constants, outputs, column_offset, state = rest
        inputs = self._inputs(logits, targets, bias, *constants, column_offset)
        self._run("simt_row_scores", len(logits), ScoreArgs(*inputs, outputs, state.data_ptr(), state.stride(0)))

    def grad(self, logits, targets, bias, *rest) -> None:
        *constants, lse, coefficients, column_offset, out = rest
        inputs = self._inputs(logits, targets, bias, *constants, column_offset)
        statistics = (lse.data_ptr(), coefficients.data_ptr(), coefficients.stride(0))
        to = (out.data_ptr(), out.stride(0), DTYPES[out.dtype])
        self._run("simt_row_grad", len(logits), GradArgs(*inputs, *statistics, *to))

    @staticmethod
    def _packed(words, tops, index=None) -> PackedRows:
        assert words.stride(1) == 1 and (index is None or index.is_contiguous())
        index = None if index is None else index.data_ptr()
        return PackedRows(words.data_ptr(), tops.data_ptr(), words.stride(0), tops.stride(0), index)

    def scores_packed(self, logits, targets, bias, scale, inv_temperature, outputs, column_offset, *rest) -> None:
        state, words, tops = rest
        assert logits.dtype == torch.float32
        inputs = self._inputs(logits, targets, bias, scale, 0.0, inv_temperature, column_offset)
        args = ScoreArgs(*inputs, outputs, state.data_ptr(), state.stride(0))
        self._run("simt_row_scores_packed", len(logits), args, self._packed(words, tops))

    def grad_packed(self, words, index, targets, scale, inv_temperature, *rest) -> None:
        lse, coefficients, column_offset, out, tops = rest
        inputs = self._inputs(out, targets, None, scale, 0.0, inv_temperature, column_offset)
        statistics = (lse.data_ptr(), coefficients.data_ptr(), coefficients.stride(0))
        args = GradArgs(*inputs, *statistics, out.data_ptr(), out.stride(0), DTYPES[out.dtype])
        self._run("simt_row_grad_packed", len(out), args, self._packed(words, tops, index))
