"""Choice of backend: order, forcing, reasons."""

from __future__ import annotations

import pytest
import torch

from support.heads import make_problem
from trl_fast.ops import BACKENDS, backend_table, linear_logprob, supports
from trl_fast.ops import backends as backends_module
from trl_fast.ops.backends import Support, choose_backend
from trl_fast.ops.device import device_facts


def run(backend=None, dtype=torch.float32):
    problem = make_problem(3, 20, dtype=dtype)
    return linear_logprob(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs


def test_every_backend_answers_with_a_reason():
    for row in backend_table("cpu"):
        assert row.backend in BACKENDS and row.reason
    assert supports("linear_logprob", "torch", "cpu", torch.float64).ok


def test_triton_on_the_cpu_says_what_it_needs():
    support = supports("linear_logprob", "triton", "cpu", torch.float32)
    assert not support.ok and "CUDA" in support.reason
    assert supports("linear_logprob", "triton", "cuda", torch.bfloat16).ok


def test_kernels_refuse_float64_by_name():
    assert "float64" in supports("linear_logprob", "cpp", "cpu", torch.float64).reason
    assert choose_backend("linear_logprob", None, device_facts(torch.device("cpu")), torch.float64) == "torch"


def test_a_forced_backend_never_falls_back(monkeypatch):
    with pytest.raises(RuntimeError, match="backend='triton' was forced for linear_logprob.*CUDA"):
        run("triton")
    monkeypatch.setenv("TRL_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="TRL_FAST_BACKEND='triton'"):
        run()
    assert run("torch").shape == (3,)


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("TRL_FAST_BACKEND", "torch")
    assert choose_backend("linear_logprob", None, device_facts(torch.device("cpu")), torch.float32) == "torch"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend: unknown name 'cudnn'"):
        run("cudnn")
    with pytest.raises(ValueError, match="op: unknown name 'softmax'"):
        supports("softmax", "torch", "cpu", torch.float32)


def test_without_the_extension_torch_serves(monkeypatch):
    monkeypatch.setattr(backends_module, "load_extension", lambda: Support(False, "not built"))
    assert choose_backend("linear_logprob", None, device_facts(torch.device("cpu")), torch.float32) == "torch"
    with pytest.raises(RuntimeError, match="not built"):
        run("cpp")
