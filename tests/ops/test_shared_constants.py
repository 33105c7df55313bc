"""Tests that constants and loss formulas agree between Python, Triton and the compiled extension."""

from __future__ import annotations

import pytest
import torch

from trl_fast.kernels.loss_kernels import LOSS_FORMULAS
from trl_fast.kernels.shared_constants import SHARED_CONSTANTS
from trl_fast.ops import backends
from trl_fast.ops.device import device_facts
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.policy_loss import LOSS_TYPES

CUDA = torch.device("cuda")
_C = pytest.importorskip("trl_fast._C", reason="the compiled extension is not there")


@pytest.fixture
def compiled_with(monkeypatch):
    """Returns a function that changes the constants that the extension was compiled with."""

    def change(**changes):
        constants = {**_C.shared_constants(), **changes}
        kept = {name: value for name, value in constants.items() if value is not None}
        monkeypatch.setattr(_C, "shared_constants", lambda: kept)

    return change


def test_the_extension_has_the_constants_of_python():
    assert _C.shared_constants() == SHARED_CONSTANTS


def test_constants_are_all_listed():
    assert len(SHARED_CONSTANTS) == 28 and SHARED_CONSTANTS["PACKED_CHUNK"] == 2048


@pytest.mark.parametrize(
    ("name", "compiled", "expected"),
    [
        ("PACKED_CHUNK", 1024, "PACKED_CHUNK is 1024 in the extension and 2048 in kernels/shared_constants.py"),
        ("TARGET", None, "TARGET is missing in the extension and 5 in kernels/shared_constants.py"),
        (
            "PAIRS",
            ("adjacent", "halves", "adjacent_to_halves"),
            "PAIRS is ('adjacent', 'halves', 'adjacent_to_halves') in the extension",
        ),
        ("NEW_STATE", 7, "NEW_STATE is 7 in the extension and missing in kernels/shared_constants.py"),
    ],
)
def test_an_extension_with_another_constant_is_refused(compiled_with, name, compiled, expected):
    unusable = backends.extension_is_unusable.__wrapped__
    assert unusable() == ""
    compiled_with(**{name: compiled})
    assert expected in unusable() and "run `pip install" in unusable()


def test_an_extension_without_the_table_is_refused(monkeypatch):
    monkeypatch.delattr(_C, "shared_constants")
    assert "ENTROPY is missing in the extension and 1 in" in backends.extension_is_unusable.__wrapped__()


@pytest.mark.parametrize(("op", "names"), [("pair_loss", tuple(PAIR_FORMULAS)), ("policy_loss", LOSS_TYPES)])
def test_kernels_have_the_formulas_of_python(op, names):
    numbers = _C.loss_formulas()[op]
    assert set(numbers) == set(LOSS_FORMULAS[op]) == set(names)
    assert len(set(numbers.values())) == len(names)


def test_a_formula_that_a_kernel_lacks_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends, "load_cuda_kernels", lambda: backends.Support(True, "compiled"))
    for backend in ("cuda", "triton"):
        assert backends.supports("pair_loss", backend, CUDA, torch.float32, "sigmoid").ok
        support = backends.supports("pair_loss", backend, CUDA, torch.float32, "new_loss")
        assert not support.ok and f"the {backend} kernel of pair_loss has no formula 'new_loss'" in support.reason
    assert backends.choose_backend("pair_loss", None, device_facts(CUDA), torch.float32, "new_loss") == "torch"
    with pytest.raises(RuntimeError, match="no formula 'new_loss'"):
        backends.choose_backend("pair_loss", "cuda", device_facts(CUDA), torch.float32, "new_loss")
