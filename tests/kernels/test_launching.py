"""Every Triton launcher runs on the GPU where its tensors are, not on the current one."""

from __future__ import annotations

import contextlib
import inspect
import re
from types import SimpleNamespace

import pytest
import torch

from trl_fast.kernels import linear_scores, losses, rows
from trl_fast.kernels.launching import on_tensors_device

LAUNCHERS = [
    pytest.param(function, id=name)
    for module in (linear_scores, losses, rows)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and re.search(r"_kernel\[", inspect.getsource(function))
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
        launcher(SimpleNamespace(is_cuda=True, device="cuda:1"), *[None] * 20)
    assert entered == ["cuda:1"]


def test_there_are_launchers():
    assert len(LAUNCHERS) >= 6
