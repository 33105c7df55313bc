"""Tests that a run says, once and in the build's words, why its build left a part out."""

from __future__ import annotations

import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch

import trl_fast
from trl_fast import build_record
from trl_fast.build_record import (
    BuildRecord,
    Installation,
    build_again,
    read_build_record,
    read_installation,
    why_refused,
)
from trl_fast.cli import env
from trl_fast.ops import backends
from trl_fast.ops.backends import Support
from trl_fast.ops.device import device_facts
from trl_fast.ops.head import cutlass_scores

AGAIN = "--force-reinstall --no-deps --no-cache-dir"
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
    monkeypatch.setattr(build_record, "read_build_record", lambda: BuildRecord("2.13", None, {"cuda": REASON}))
    assert ("  CUDA part", f"not built: {REASON}") in env.binary_parts()


@pytest.mark.parametrize("is_built", [False, True])
def test_env_says_whether_the_kernel_made_with_cutlass_is_there(without_cuda, monkeypatch, is_built):
    monkeypatch.setattr(trl_fast._C, "build_info", lambda: {"cuda": True, "isa": "avx2"})
    monkeypatch.setattr(cutlass_scores, "cutlass_is_built", lambda: is_built)
    found = SimpleNamespace(origin="_C.so", submodule_search_locations=None)
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(build_record, "read_build_record", lambda: BuildRecord("2.13", "13.0", {"cutlass": REASON}))
    assert (("  CUTLASS part", f"not built: {REASON}") in env.binary_parts()) != is_built


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"other": 1}'])
def test_without_a_note_of_the_build_there_is_no_reason_but_a_way(tmp_path, text):
    if text is not None:
        (tmp_path / "_build.json").write_text(text)
    record = read_build_record(tmp_path)
    assert record == BuildRecord() and record.why_missing("cuda") == "no build is on record here"


def test_a_reason_has_the_command_that_builds_the_part(monkeypatch):
    monkeypatch.setattr(backends, "read_build_record", lambda: BuildRecord("2.13", None, {"cuda": "no toolkit"}))
    monkeypatch.setattr(backends, "read_installation", lambda: Installation("pip", "/src/trl fast", True))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert backends.why_not_built("cuda") == (
        "no toolkit; to build it run `CUDA_HOME=/path/to/cuda-13.0 pip install --force-reinstall --no-deps "
        "--no-cache-dir -e '/src/trl fast'`"
    )


@pytest.mark.parametrize(
    ("installation", "command"),
    [
        (Installation("pip", "/src", False), "pip install --force-reinstall --no-deps --no-cache-dir /src"),
        (Installation("pip", "/a/trl_fast.whl"), f"pip install {AGAIN} --no-binary trl-fast trl-fast"),
        (Installation(), f"pip install {AGAIN} --no-binary trl-fast trl-fast"),
        (Installation("pip", "git+https://host/x"), f"pip install {AGAIN} git+https://host/x"),
        (
            Installation("uv", "/src", True),
            "uv pip install --no-build-isolation --no-deps --reinstall-package trl-fast -e /src",
        ),
    ],
)
def test_the_command_fits_how_it_was_installed(installation, command):
    assert build_again(installation) == f"`{command}`"


@pytest.mark.parametrize(
    ("direct_url", "installer", "expected"),
    [
        ('{"url": "file:///a%20b", "dir_info": {"editable": true}}', "pip\n", Installation("pip", "/a b", True)),
        ('{"url": "file:///a", "dir_info": {}}', "uv", Installation("uv", "/a", False)),
        ('{"url": "https://h/x", "vcs_info": {"vcs": "git"}}', "pip", Installation("pip", "git+https://h/x")),
        ('{"url": "https://h/x.tar.gz", "archive_info": {}}', "pip", Installation("pip", "https://h/x.tar.gz")),
        (None, "pip", Installation("pip", "")),
    ],
)
def test_how_it_was_installed_is_read(monkeypatch, tmp_path, direct_url, installer, expected):
    texts = {"direct_url.json": direct_url, "INSTALLER": installer}
    monkeypatch.setattr(build_record, "PACKAGE", tmp_path / "trl_fast")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=texts.get))
    assert read_installation.__wrapped__() == expected


def test_a_source_tree_that_was_not_installed_is_what_would_be(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(build_record, "PACKAGE", tmp_path / "trl_fast")
    assert read_installation.__wrapped__() == Installation()
    (tmp_path / "setup.py").touch()
    assert read_installation.__wrapped__() == Installation("pip", str(tmp_path), True)


@pytest.mark.parametrize(
    ("record", "torch_version", "cuda", "refused"),
    [
        (BuildRecord(), "2.14.1", None, ""),
        (BuildRecord("2.13"), "2.13.2+cpu", None, ""),
        (BuildRecord("2.13"), "2.13.0a0+nv26", "13.0", ""),
        (BuildRecord("2.13", "13.0"), "2.13.0+cu132", "13.2", ""),
        (
            BuildRecord("2.13"),
            "2.14.1+cpu",
            None,
            "compiled for torch 2.13, and this is torch 2.14.1+cpu without CUDA",
        ),
        (BuildRecord("2.1"), "2.13.0", None, "compiled for torch 2.1, and this is torch 2.13.0 without CUDA"),
        (
            BuildRecord("2.13", "13.0"),
            "2.13.0+cu128",
            "12.8",
            "compiled for torch 2.13 with CUDA 13.0, and this is torch 2.13.0+cu128 with CUDA 12.8",
        ),
        (
            BuildRecord("2.13", "13.0"),
            "2.13.0+cpu",
            None,
            "compiled for torch 2.13 with CUDA 13.0, and this is torch 2.13.0+cpu without CUDA",
        ),
    ],
)
def test_another_torch_is_refused_by_name(record, torch_version, cuda, refused):
    line = why_refused(record, torch_version, cuda, "`make`")
    assert line == (
        f"trl_fast is {refused}: run `make`, or go back with `pip install 'torch=={record.torch}.*'`"
        if refused
        else ""
    )


def test_an_extension_that_cannot_be_used_is_an_error_unless_a_backend_is_forced(monkeypatch):
    monkeypatch.delenv("TRL_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends, "read_build_record", lambda: BuildRecord("2.10"))
    unusable = backends.extension_is_unusable.__wrapped__
    monkeypatch.setattr(backends, "extension_is_unusable", unusable)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="_C.so"))
    facts = device_facts(torch.device("cpu"))
    with pytest.raises(ImportError, match="compiled for torch 2.10, .*; TRL_FAST_BACKEND=torch runs in pure PyTorch"):
        backends.choose_backend("linear_logprob", None, facts, torch.float32)
    assert backends.choose_backend("linear_logprob", "torch", facts, torch.float32) == "torch"
    assert backends._try_extension() == Support(False, unusable())
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert unusable() == ""
