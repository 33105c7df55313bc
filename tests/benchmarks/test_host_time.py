"""Host time of layers: every contender runs what its name says, forward and backward."""

from contextlib import nullcontext

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from benchmarks import host_time
from benchmarks.host_time import (
    CONTENDERS,
    decoder_layer,
    kernels_of_a_gpu,
    layers,
    linear_layers,
    main,
    measure,
    ops_in_python,
)
from support.seen_operators import SeenOperators
from trl_fast.ops.layers import rms_norm


@pytest.fixture
def function_of_the_family():
    before = modeling_qwen2.apply_rotary_pos_emb
    yield
    modeling_qwen2.apply_rotary_pos_emb = before


def check_contenders(layer):
    torch.manual_seed(0)
    given = [torch.randn(shape, requires_grad=True) for shape in layer.shapes]

    def results(run):
        made = run(*given)
        outs = [made] if isinstance(made, torch.Tensor) else [*made]
        return *outs, *torch.autograd.grad(outs, given, [torch.full_like(out, 0.5) for out in outs])

    for fused, plain in zip(results(layer.fused), results(layer.plain), strict=True):
        # A sum is rounded as its terms are large; the products may be others' than PyTorch's.
        torch.testing.assert_close(fused, plain, rtol=1.3e-6, atol=1e-6 * max(1.0, plain.abs().max().item()))
    assert measure(layer, calls=1, rounds=1).keys() == CONTENDERS.keys()


@pytest.mark.parametrize("layer", [*layers(), *linear_layers()], ids=lambda layer: layer.name)
def test_contenders_compute_the_same(layer):
    check_contenders(layer)


def test_decoder_layers_compute_the_same(function_of_the_family):
    """On one sequence, whose attention PyTorch's code computes, too."""
    check_contenders(decoder_layer(((8,),), range(8)))


def test_ops_run_in_python_when_asked():
    names = []
    for _ in range(2):
        with SeenOperators() as seen:
            rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
        names.append("trl_fast::rms_norm" in seen.names)
        if len(names) == 1:
            with ops_in_python(), SeenOperators() as seen:
                rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
            assert "trl_fast::rms_norm" in seen.names
    assert names == [False, False]


@pytest.mark.slow  # compiles the stand-ins
def test_a_decoder_layer_makes_the_calls_of_a_gpu(function_of_the_family):
    layer = decoder_layer()
    with kernels_of_a_gpu(), SeenOperators() as seen:
        out = layer.fused(torch.ones(layer.shapes[0], requires_grad=True))
        out.backward(torch.ones_like(out))
    names = [name for name in seen.names if "flash" in name or "merge" in name]
    assert (
        names
        == [*["aten::_flash_attention_forward"] * 2, "trl_fast::merge_attention"]
        + ["aten::_flash_attention_backward"] * 2
    )


def test_the_table_is_printed(capsys, monkeypatch, function_of_the_family):
    monkeypatch.setattr(host_time, "kernels_of_a_gpu", nullcontext)
    main(["--calls", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "host time of a call" in printed and "norm" in printed
