"""Steps on one of several devices, with quantized weights, and with other optimizers: the sizes that are counted."""

import pytest

from support.models import tiny_config
from trl_fast.planning.fake_models import meta_model
from trl_fast.planning.memory_timeline import (
    FORWARD_STAGE,
    GATHERED,
    GRADIENTS,
    HEAD_STAGE,
    KINDS,
    LAST_LAYER,
    OPTIMIZER,
    OPTIMIZER_STAGE,
    REFERENCE,
    SAVED,
    WEIGHTS,
    highest,
)
from trl_fast.planning.peak_estimates import stage_peaks
from trl_fast.planning.quantized_layers import BLOCK, QuantizedLinear
from trl_fast.planning.sharding import SHARINGS, model_sizes, sharded
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup

pytestmark = pytest.mark.plans

LENGTH = 64


def setup_of(**changes):
    return TrainingSetup(
        tiny_config("llama", num_hidden_layers=4), **{"dtype": "float32", "method": "dpo", "device": "cpu", **changes}
    )


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def test_devices_share_what_the_table_says():
    """Of float32 weights without autocast, so that no engine keeps other numbers; but for DeepSpeed's copies."""
    alone = stage_peaks(setup_of(bf16=False), LENGTH)
    for engine, sharing in SHARINGS.items():
        setup = setup_of(num_gpus=4, engine=engine, bf16=False)
        trained = model_sizes(setup).trained_bytes
        for stage, peak in sharded(alone, setup).items():
            for kind in (WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER, SAVED):
                whole = alone[stage].parts[kind] + (trained if kind == OPTIMIZER and sharing.copies_weights else 0)
                share = 4 if kind in sharing.shares else 1
                assert peak.parts[kind] == pytest.approx(whole / share), (engine, stage, kind)


def test_engines_that_share_everything_take_least_and_ddp_most():
    whole = stage_peaks(setup_of(), LENGTH)
    setups = {name: setup_of(num_gpus=4, engine=name) for name in ("ddp", "fsdp1", "fsdp2")}
    peaks = {name: highest(sharded(whole, setup)).bytes for name, setup in setups.items()}
    alone = highest(whole).bytes
    assert peaks["fsdp2"] <= peaks["fsdp1"] < alone < peaks["ddp"]


def test_fsdp_trains_float32_weights_whatever_their_dtype():
    setup = setup_of(num_gpus=4, dtype="bfloat16", method="sft")
    trained = model_sizes(setup).trained
    parts = stage_peaks(setup, LENGTH)[OPTIMIZER_STAGE].parts
    assert [parts[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER)] == pytest.approx(
        [trained, trained, 2 * trained], rel=0.02
    )
    # DeepSpeed's are 16 bits wide, with a float32 copy and averages beside them.
    parts = stage_peaks(setup.but(engine="zero2"), LENGTH)[OPTIMIZER_STAGE].parts
    assert [parts[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER)] == pytest.approx(
        [2 * trained, trained / 2, 3 * trained], rel=0.02
    )


def test_what_fsdp_has_whole_stage_by_stage():
    setup = setup_of(num_gpus=4, lora_r=4)
    sizes = model_sizes(setup)
    peaks = stage_peaks(setup, LENGTH)
    # In bfloat16, in which they multiply; of adapters no gradient worth mentioning.
    assert peaks[FORWARD_STAGE].parts[GATHERED] == 2 * (sizes.layer + max(sizes.layer, sizes.embedding, sizes.head))
    assert peaks[HEAD_STAGE].parts[GATHERED] == 2 * (sizes.layer + sizes.head)
    # A frozen head has done its part in forward.
    assert peaks[LAST_LAYER].parts[GATHERED] == pytest.approx(2 * 2 * sizes.layer, rel=0.1)
    assert peaks[OPTIMIZER_STAGE].parts[GATHERED] == 0
    assert stage_peaks(setup.but(bf16=False), LENGTH)[FORWARD_STAGE].parts[GATHERED] == pytest.approx(
        2 * peaks[FORWARD_STAGE].parts[GATHERED]
    )


def test_gradients_of_fsdp_are_whole_from_one_micro_batch_to_the_next():
    setup = setup_of(num_gpus=4, gradient_accumulation_steps=2, method="sft")
    peaks = stage_peaks(setup, LENGTH)
    sizes = model_sizes(setup)
    # The head's, summed in tiles, are the device's share in float32.
    assert sizes.trained - sizes.whole_gradients == sizes.tiled == 340 * 32
    assert peaks[FORWARD_STAGE].parts[GRADIENTS] == 2 * sizes.whole_gradients + 4 * sizes.tiled / 4
    assert peaks[OPTIMIZER_STAGE].parts[GRADIENTS] == pytest.approx(model_sizes(setup).trained, rel=0.01)


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(ValueError, match="engine='fsdp3' is unknown; expected one of ddp, zero1"):
        stage_peaks(setup_of(num_gpus=2, engine="fsdp3"), LENGTH)


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


@pytest.mark.parametrize("kind, share", [("4bit", 0.5 + 4 / 64), pytest.param("8bit", 1, marks=pytest.mark.slow)])
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
