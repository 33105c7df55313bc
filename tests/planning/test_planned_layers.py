"""Tests the line on a model's layers, and that kernels which no simulation can run are left aside, and named."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

from trl_fast.modeling.layer_kernels import LayerKernel
from trl_fast.planning.fake_models import shortened
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.planned_layers import layers_line
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup


def shape(name, layers):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shortened(model_config(name), layers))


@pytest.mark.parametrize(
    "name, layers, line",
    [
        ("qwen3-0.6b", 2, "Layout: packed."),
        ("gpt-oss-20b", 4, "2 of attention in a window of 128 tokens with sinks, 2 of attention with sinks."),
        (
            "qwen3.5-2b",
            4,
            "Layout: packed. Layers: 3 of Gated DeltaNet, 1 of attention. Those with a state are planned in "
            "transformers' PyTorch code, as here: causal-conv1d is not installed; flash-linear-attention is not "
            "installed.",
        ),
    ],
)
def test_the_line(name, layers, line):
    assert layers_line(shape(name, layers), "packed").endswith(line)


def test_installed_kernels_are_named(monkeypatch):
    monkeypatch.setattr(LayerKernel, "fitness", lambda self: (True, f"{self.distributions[0]} 9.1"))
    assert layers_line(shape("qwen3.5-2b", 4), "packed").endswith(
        "Those with a state are planned in transformers' PyTorch code. Here causal-conv1d 9.1 and "
        "flash-linear-attention 9.1 serve them, with less memory and time than planned."
    )


def test_a_plan_runs_pytorch_code_where_kernels_are_installed(monkeypatch):
    """transformers takes a package's kernel when its module is imported; it is taken again here."""
    setup = TrainingSetup(model_config("qwen3.5-2b"), method="sft")
    expected = simulate(setup, 64, 1).peak().bytes
    name = "torch_chunk_gated_delta_rule"
    package, runs = ModuleType("fla"), []
    package.chunk_gated_delta_rule = lambda *args, **kwargs: runs.append(args)
    monkeypatch.setitem(sys.modules, "fla", package)
    choose = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    chosen = choose(inspect.unwrap(getattr(modeling_qwen3_5, name)))
    monkeypatch.setattr(modeling_qwen3_5, name, chosen)
    chosen(torch.zeros(1))
    assert len(runs) == 1
    assert simulate(setup, 64, 1).peak().bytes == expected and len(runs) == 1
    assert getattr(modeling_qwen3_5, name) is chosen
