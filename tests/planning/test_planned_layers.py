"""Tests the line on a model's layers, and that kernels which no simulation can run are refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_fast.modeling.layer_kernels import LayerKernel
from trl_fast.planning.fake_models import planned_models, shortened
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.planned_layers import layers_line
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


def test_installed_kernels_are_refused_by_name(monkeypatch):
    setup = TrainingSetup(model_config("qwen3.5-2b"), method="sft")
    assert planned_models(setup, 64, 4).layout == "packed"
    monkeypatch.setattr(LayerKernel, "fitness", lambda self: (True, f"{self.distributions[0]} 9.1"))
    with pytest.raises(ValueError, match="kernels of causal-conv1d 9.1 and flash-linear-attention 9.1 here, which"):
        planned_models(setup, 64, 4)
