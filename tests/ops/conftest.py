"""The backends that the ops' tests run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from support.heads import BACKENDS
from trl_fast.ops.backends import load_extension


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under the interpreter, losses in float16 are slow tests; linear_logprob runs the same row kernels in it.

    Of the divergence, whose kernel has tests of its own, a default run has the values and gradients there.
    """
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        is_loss = getattr(item, "originalname", "") == "test_loss_and_gradients"
        if is_loss and params.get("backend") == "triton" and params.get("dtype") == torch.float16:
            item.add_marker(pytest.mark.slow)
        is_divergence = item.path.name == "test_linear_divergence.py"
        if is_divergence and params.get("backend") == "triton" and item.originalname != "test_value_and_gradients":
            item.add_marker(pytest.mark.gpu_code)


def require_extension() -> None:
    """Skips where nothing is compiled; on CI that is a failure."""
    built = load_extension()
    if not built.ok and not os.environ.get("CI"):
        pytest.skip(built.reason)
    assert built.ok, built.reason


@pytest.fixture(scope="module")
def extension() -> None:
    """The compiled extension, loaded."""
    require_extension()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend's name in turn; Triton runs under the repaired interpreter."""
    name = request.param
    with contextlib.ExitStack() as stack:
        if name == "cpp":
            require_extension()
        if name == "triton":
            from support.triton_interpreter import interpreted_kernels

            stack.enter_context(interpreted_kernels())
        yield name
