"""Tests that a run says, once and in the build's words, why its build left a part out."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import trl_fast
from trl_fast.cli import env
from trl_fast.ops import backends
from trl_fast.ops.backends import Support

REASON = "row_kernels.cu(7): error: no instance matches; CUDA_HOME is /opt/cuda"


@pytest.fixture
def without_cuda(monkeypatch):
    """An extension whose CUDA part failed to build."""
    extension = SimpleNamespace(build_info=lambda: {"cuda": False, "isa": "avx2"})
    monkeypatch.setitem(sys.modules, "trl_fast._C", extension)
    monkeypatch.setattr(trl_fast, "_C", extension, raising=False)
    monkeypatch.setattr(backends, "load_extension", lambda: Support(True, "compiled"))
    monkeypatch.setattr(backends, "why_not_built", {"cuda": REASON}.get)
    backends.load_cuda_kernels.cache_clear()
    yield
    backends.load_cuda_kernels.cache_clear()


def test_a_gpu_without_the_cuda_part_is_told_why_once(without_cuda, caplog):
    reason = f"the C++ extension was built without CUDA: {REASON}"
    for _ in range(2):
        assert backends.supports("linear_logprob", "cuda", "cuda", torch.float32) == (False, reason)
    said = [record.message for record in caplog.records]
    assert said == [f"{reason}. Until then its kernels on GPUs are Triton's or PyTorch's."]


def test_env_says_so_too(without_cuda, monkeypatch):
    found = SimpleNamespace(origin="_C.so", submodule_search_locations=None)
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: found)
    assert ("  CUDA part", f"not built: {REASON}") in env.binary_parts()


@pytest.mark.parametrize("text", [None, "", "{"])
def test_without_a_note_of_the_build_the_way_is_told(monkeypatch, tmp_path, text):
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    if text is not None:
        (tmp_path / "_build.json").write_text(text)
    for part in ("extension", "cuda"):
        assert backends.why_not_built.__wrapped__(part).endswith("install with `pip install --no-build-isolation`")
