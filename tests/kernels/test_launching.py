"""Tests that every Triton launcher runs on the GPU where its tensors are, not on the current one."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trl_fast.kernels import row_kernels
from trl_fast.kernels.launching import on_tensors_device

pytestmark = pytest.mark.gpu_code

# What takes a tensor first and is for others to call.
LAUNCHERS = [
    pytest.param(function, id=f"{path.stem}.{name}")
    for path in sorted(Path(row_kernels.__file__).parent.glob("*.py"))
    for name, function in inspect.getmembers(importlib.import_module(f"trl_fast.kernels.{path.stem}"))
    if inspect.isfunction(function)
    and function.__module__ == f"trl_fast.kernels.{path.stem}"
    and not name.startswith("_")
    and next(iter(inspect.signature(function).parameters.values())).annotation is torch.Tensor
]


def test_the_current_gpu_is_the_first_tensors_while_the_launcher_runs(monkeypatch):
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(wanted):
        current.append(str(wanted))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    launch = on_tensors_device(lambda tensor, *, answer: (current[-1], answer))
    second = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    assert launch(second, answer=42) == ("cuda:1", 42)
    assert launch(torch.zeros(1), answer=42) == ("cuda:0", 42)
    assert current == ["cuda:0"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_does_so(launcher, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    with contextlib.suppress(Exception):  # It is no tensor, and whatever comes next is not what is tested.
        launcher(SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")), *[None] * 20)
    assert entered == [torch.device("cuda:1")]


def test_there_are_launchers():
    assert len(LAUNCHERS) >= 6
