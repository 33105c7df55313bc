"""The backends that the ops' tests run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.heads import BACKENDS
from trl_fast.ops.backends import load_extension


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under the interpreter, losses in float16 are slow tests, and what adds little waits for `make test-more`."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("backend") != "triton":
            continue
        if item.originalname == "test_loss_and_gradients" and params.get("dtype") == torch.float16:
            item.add_marker(pytest.mark.slow)
        if _adds_little(item.path.name, item.originalname, params):
            item.add_marker(pytest.mark.gpu_code)


def _adds_little(file: str, test: str, params: dict[str, Any]) -> bool:
    """Says whether a default run has the test's kernels by another one, and its path with other numbers.

    linear_logprob runs the row kernels in every dtype, and the other ops in float32; the divergence's kernel and those
    of pair losses have tests of their own.
    """
    return (
        (params.get("dtype") == torch.bfloat16 and file != "test_linear_logprob.py")
        or (file == "test_linear_divergence.py" and test != "test_value_and_gradients")
        or (test == "test_groups_are_seen_whole_and_have_exact_gradients" and params["workspace_bytes"] is not None)
        or (test == "test_pair_losses" and params["loss_type"] != "sigmoid")
    )


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
