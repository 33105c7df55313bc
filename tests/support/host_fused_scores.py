"""Stands in for the CUDA ops of the fused kernel: PyTorch's product, and the scoring of tiles compiled as host C++."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from support.host_kernels import Transform


class Parts(ctypes.Structure):
    """Mirrors trl_fast::Parts; the structures here are those of csrc/cuda/tile_scores.h, field by field."""

    _fields_ = [("first", ctypes.c_void_p), ("slot_stride", ctypes.c_int64), ("part_stride", ctypes.c_int64)]


class TileScoreArgs(ctypes.Structure):
    _fields_ = [
        ("targets", ctypes.c_void_p),
        ("transform", Transform),
        ("outputs", ctypes.c_int64),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("parts", Parts),
        ("state", ctypes.c_void_p),
        ("state_stride", ctypes.c_int64),
        ("words", ctypes.c_void_p),
        ("raw", ctypes.c_void_p),
        ("kept_stride", ctypes.c_int64),
    ]


class MergeArgs(ctypes.Structure):
    _fields_ = [
        ("parts", Parts),
        ("rows", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("state_stride", ctypes.c_int64),
        ("tops", ctypes.c_void_p),
        ("tops_stride", ctypes.c_int64),
    ]


def _parts(parts: torch.Tensor) -> Parts:
    assert parts.dtype == torch.float32 and parts.stride(2) == 1
    return Parts(parts.data_ptr(), parts.stride(0), parts.stride(1))


class HostFusedScores:
    """The ops `fused_scores` and `merge_parts`, with their signatures; each call shuffles the threads anew."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.calls = 0

    def fused_scores(self, hidden, weight, *rest) -> None:
        assert hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        # In float64, so that rounding does not depend on how a library goes about so many rows.
        products = (hidden.double() @ weight.double().t()).float()
        self.scores_of(products, *rest)

    def scores_of(self, products, targets, bias, scale, softcap, inv_temperature, outputs, parts, state, kept) -> None:
        """Scores products (R, C) float32 as the kernel does."""
        products, targets = products.contiguous(), targets.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        transform = Transform(None if bias is None else bias.data_ptr(), scale, softcap, inv_temperature)
        room = (None, None, 0)
        if kept is not None:
            assert kept.data_ptr() % 16 == 0 and kept.stride(0) * kept.element_size() % 16 == 0 and kept.stride(1) == 1
            place, is_raw = kept.data_ptr(), kept.dtype == torch.float32
            room = (None if is_raw else place, place if is_raw else None, kept.stride(0))
        args = TileScoreArgs(
            *(targets.data_ptr(), transform, outputs, *products.shape),
            *(_parts(parts), state.data_ptr(), state.stride(0), *room),
        )
        self._run("simt_fused_scores", args, ctypes.c_void_p(products.data_ptr()), ctypes.c_int64(products.stride(0)))

    def merge_parts(self, parts, outputs, state, tops) -> None:
        kept = (None, 0) if tops is None else (tops.data_ptr(), tops.stride(0))
        sizes = parts.shape[2], parts.shape[1]
        self._run(
            "simt_merge_parts", MergeArgs(_parts(parts), *sizes, outputs, state.data_ptr(), state.stride(0), *kept)
        )

    def _run(self, name: str, args: ctypes.Structure, *more: object) -> None:
        self.calls += 1
        getattr(self.library, name)(ctypes.byref(args), *more, ctypes.c_uint(self.calls))
