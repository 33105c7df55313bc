"""Two shallow models tell what a deep one takes whose layers repeat in a pattern."""

import pytest

from support.models import tiny_config
from trl_fast.planning.memory_timeline import highest
from trl_fast.planning.model_shapes import SHAPES, model_config
from trl_fast.planning.peak_estimates import stage_peaks
from trl_fast.planning.shallow_models import ShallowModels, shallow_models
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.step_times import step_work
from trl_fast.planning.training_setup import TrainingSetup

HYBRID = ["linear_attention", "linear_attention", "full_attention"]
NEXT = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


@pytest.mark.parametrize(
    "name, fewer, more",
    [
        ("llama-3.2-1b", 2, 3),
        ("gemma-3-4b", 10, 16),
        ("gpt-oss-20b", 4, 6),
        ("qwen3.5-2b", 8, 12),
        ("olmo-3-7b", 8, 12),
    ],
)
def test_models_end_as_the_whole_one_and_have_every_kind_of_layer_between(name, fewer, more):
    assert shallow_models(TrainingSetup(model_config(name))) == ShallowModels(fewer, more)


def test_layers_that_do_not_repeat_are_simulated_whole():
    assert shallow_models(TrainingSetup(model_config("lfm2-1.2b"))) is None
    assert shallow_models(TrainingSetup(tiny_config("llama", num_hidden_layers=3))) is None


def test_offloading_has_more_layers_between():
    setup = TrainingSetup(tiny_config("llama", num_hidden_layers=9), activation_offloading=True)
    assert shallow_models(setup) == ShallowModels(4, 5)


def test_each_layer_has_one_that_is_like_it():
    shallow = ShallowModels(10, 16)
    assert [shallow.like(layer) for layer in range(34)] == [*range(16), *range(10, 16), *range(10, 16), *range(10, 16)]


@pytest.mark.parametrize(
    "family, changes",
    [
        pytest.param(
            *("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 16}),
            marks=pytest.mark.slow,
        ),
        pytest.param("qwen3_next", {"layer_types": 4 * HYBRID, **NEXT}, marks=pytest.mark.slow),
    ],
)
def test_the_line_is_that_of_the_whole_model(family, changes):
    """Memory and work of models of 8 and 12 layers of two kinds."""
    config = tiny_config(family, num_hidden_layers=len(changes["layer_types"]), **changes)
    setup = TrainingSetup(config, method="sft", device="gpu", per_device_train_batch_size=1)
    assert shallow_models(setup) is not None
    whole = simulate(setup, 128, counts_work=True)
    estimated, exact = stage_peaks(setup, 128), whole.stage_peaks()
    assert highest(estimated).bytes == pytest.approx(highest(exact).bytes, rel=0.01)
    work, total = step_work(setup, 128), sum(one.attention_flops for one in whole.work.values())
    assert work.attention_flops == pytest.approx(total, rel=1e-6) and total > 0
    assert work.moved == pytest.approx(sum(one.moved for one in whole.work.values()), rel=1e-3)


def test_shapes_are_those_that_their_names_say():
    """By the billions of weights in a name, as its publisher rounds them."""
    import torch
    from transformers import AutoModelForCausalLM

    for name in ("qwen3.5-4b", "olmo-3-7b", "lfm2-1.2b", "nemotron-h-8b", "gpt-oss-20b", "gemma-4-31b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(name))
        billions = sum(weight.numel() for weight in model.parameters()) / 1e9
        assert name in SHAPES and billions == pytest.approx(float(name.rpartition("-")[2].removesuffix("b")), rel=0.06)
