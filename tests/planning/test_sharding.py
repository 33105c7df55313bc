"""Steps on one of several devices, with quantized weights, and with other optimizers: the sizes that are counted."""

import pytest

from support.models import tiny_config
from trl_fast.planning.fake_models import meta_model
from trl_fast.planning.memory_timeline import (
    FORWARD_STAGE,
    GATHERED,
    GRADIENTS,
    KINDS,
    OPTIMIZER,
    OPTIMIZER_STAGE,
    REFERENCE,
    SAVED,
    WEIGHTS,
)
from trl_fast.planning.peak_estimates import stage_peaks
from trl_fast.planning.quantized_layers import BLOCK, QuantizedLinear
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup

LENGTH = 64


def setup_of(**changes):
    return TrainingSetup(
        tiny_config("llama", num_hidden_layers=4), **{"dtype": "float32", "method": "dpo", "device": "cpu", **changes}
    )


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def test_devices_share_weights_gradients_and_optimizer():
    alone, one_of_four = (stage_peaks(setup_of(num_gpus=count), LENGTH) for count in (1, 4))
    for stage, peak in alone.items():
        for kind in (WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER):
            assert one_of_four[stage].parts[kind] == pytest.approx(peak.parts[kind] / 4)
        assert one_of_four[stage].parts[SAVED] == peak.parts[SAVED]
    assert one_of_four[OPTIMIZER_STAGE].bytes < 0.3 * alone[OPTIMIZER_STAGE].bytes


def test_layers_at_work_are_whole():
    setup = setup_of(num_gpus=4)
    model = meta_model(setup)
    layer = size(model.model.layers[0])
    root = size(model) - 4 * layer
    gathered = stage_peaks(setup, LENGTH)[FORWARD_STAGE].parts[GATHERED]
    # In bfloat16, in which they multiply.
    assert gathered == 2 * (root + 2 * layer)
    assert stage_peaks(setup_of(num_gpus=4, bf16=False), LENGTH)[FORWARD_STAGE].parts[GATHERED] == 2 * gathered


def test_quantized_weights_take_half_a_byte_and_their_constants():
    plain, double = (
        meta_model(setup_of(lora_r=4, quantization="4bit", nested_quantization=nested)) for nested in (False, True)
    )
    for model, constants in ((plain, 4), (double, 1)):
        (layer,) = {module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj")}
        count = layer.in_features * layer.out_features
        assert isinstance(layer, QuantizedLinear) and layer.weight.nbytes == count // 2
        assert layer.absmax.nbytes == count // BLOCK * constants
    # The head keeps its dtype.
    assert not isinstance(plain.get_output_embeddings(), QuantizedLinear)


@pytest.mark.parametrize("kind, share", [("4bit", 0.5 + 4 / 64), ("8bit", 1)])
def test_a_step_with_quantized_weights(kind, share):
    """Only layers shrink; the weight of a product is there whole while it is needed."""
    setup = setup_of(lora_r=4, lora_target_modules="all-linear", dtype="bfloat16")
    before, after = (simulate(one, LENGTH) for one in (setup, setup.but(quantization=kind)))
    linear = sum(module.weight.numel() for name, module in meta_model(setup).named_modules() if name.endswith("_proj"))
    weights = [int(step.levels[KINDS.index(WEIGHTS)].max()) for step in (before, after)]
    # Adapters are in bfloat16 with quantized weights (QLoRA), in float32 else.
    adapters = 4 * sum(
        m.in_features + m.out_features for n, m in meta_model(setup).named_modules() if n.endswith("_proj")
    )
    saved = (2 - share) * linear + 2 * adapters
    assert weights[0] - weights[1] == pytest.approx(saved, rel=0.1)
    assert after.peak().bytes < before.peak().bytes


@pytest.mark.parametrize("optim, bytes_of_a_weight", [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("sgd", 0)])
def test_what_optimizers_keep(optim, bytes_of_a_weight):
    setup = setup_of(method="sft", optim=optim)
    kept = int(simulate(setup, LENGTH).levels[KINDS.index(OPTIMIZER)].max())
    assert kept == pytest.approx(bytes_of_a_weight * size(meta_model(setup)), rel=0.1)
