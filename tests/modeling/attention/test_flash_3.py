"""FlashAttention 3 is switched on where it is installed for a Hopper GPU, tried out, and put back."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn import attention as torch_attention

from support.models import tiny_config
from support.row_attention import VarlenOnTheCpu
from trl_fast.modeling.attention import flash_3
from trl_fast.ops.device import DeviceFacts, simulated_device

CPU = torch.device("cpu")
HOPPER = DeviceFacts("cuda", True, (9, 0), serves=lambda op, backend: backend == "torch")


@pytest.fixture
def installed(monkeypatch):
    """The package, and torch's registry of implementations; returns what was switched on and off, in order."""
    done, active, off_by = [], [], [1.0]
    kernels = VarlenOnTheCpu(monkeypatch)
    right, right_backward = kernels.forward, kernels.backward

    def activate(name):
        done.append(f"on {name}")
        active.append(name)

    def restore():
        done.append("off")
        active.clear()

    def forward(*given, **options):
        out, *rest = right(*(one.float() for one in given[:3]), *given[3:], **options)
        return (out * off_by[0] if active else out).to(given[0].dtype), *rest

    def backward(*given, **options):
        return right_backward(*(one.float() for one in given[:6]), *given[6:], **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(torch_attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", restore)
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: active[-1] if active else None)
    monkeypatch.setattr(flash_3.importlib.util, "find_spec", lambda name: name == "flash_attn_interface" or None)
    return SimpleNamespace(done=done, active=active, off_by=off_by, kernels=kernels)


def model(**changes):
    return SimpleNamespace(config=tiny_config("llama", **changes), device=CPU)


def test_it_is_switched_on_once_and_put_back(installed):
    with simulated_device(HOPPER):
        assert flash_3.use_flash_3(model())
        # A reference beside it: it is on already.
        assert not flash_3.use_flash_3(model())
    assert installed.done == ["on FA3"] and installed.kernels.calls
    flash_3.switch_off()
    flash_3.switch_off()
    assert installed.done == ["on FA3", "off"]


def test_what_it_lacks_or_somebody_has_chosen_is_left_alone(installed, monkeypatch):
    with simulated_device(HOPPER):
        assert not flash_3.use_flash_3(model(attention_dropout=0.1))
        installed.active.append("FA4")
        assert not flash_3.use_flash_3(model())
        flash_3.switch_off()
    assert installed.done == [] and installed.active == ["FA4"]


def test_other_numbers_or_an_error_put_torchs_own_kernels_back(installed, monkeypatch, caplog):
    installed.off_by[0] = 1.1
    with simulated_device(HOPPER), caplog.at_level(logging.WARNING, "trl_fast"):
        assert not flash_3.use_flash_3(model())

        def fails(name):
            raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 backward kernels")

        monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", fails)
        assert not flash_3.use_flash_3(model())
    assert installed.done == ["on FA3", "off"]
    first, second = (record.message for record in caplog.records)
    assert first.startswith("FlashAttention 3 is not used: its numbers differ from torch's by 0.1")
    assert second == (
        "FlashAttention 3 is not used: Module 'flash_attn_interface' does not expose FA3 backward kernels."
    )


def test_reasons(installed, monkeypatch):
    with simulated_device(HOPPER):
        assert flash_3.flash_3_serves(CPU) == (True, "torch's flash operators are computed by flash_attn_interface")
        monkeypatch.setattr(flash_3.importlib.util, "find_spec", lambda name: None)
        assert flash_3.flash_3_serves(CPU)[1] == "the package flash_attn_interface is not installed"
        monkeypatch.setattr(torch_attention, "list_flash_attention_impls", lambda: [])
        assert flash_3.flash_3_serves(CPU)[1] == f"torch {torch.__version__} does not know it"
        monkeypatch.setenv("TRL_FAST_FA3", "0")
        assert flash_3.flash_3_serves(CPU) == (False, "TRL_FAST_FA3=0 is set")
    monkeypatch.delenv("TRL_FAST_FA3")
    assert flash_3.flash_3_serves(CPU)[1] == "it is for GPUs of compute capability 9.0 (Hopper)"
