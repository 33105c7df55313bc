"""The work of a step: operations against formulas, what repeats, and the rates of GPUs."""

import pytest

from support.models import tiny_config
from trl_fast.planning.fake_models import meta_model
from trl_fast.planning.gpu_facts import GPUS, gpu_named, gpu_of_device
from trl_fast.planning.memory_sizes import GIB
from trl_fast.planning.memory_timeline import FORWARD_STAGE, GENERATION_STAGE, OPTIMIZER_STAGE
from trl_fast.planning.peak_estimates import simulated
from trl_fast.planning.roofline.work import HOST_SECONDS, Work
from trl_fast.planning.sharding import SHARINGS, model_sizes
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.step_times import planned_wire, planned_work, step_work
from trl_fast.planning.training_setup import TrainingSetup
from trl_fast.planning.wire import Passes, wire_of, wire_work

pytestmark = pytest.mark.plans

LENGTH = 64
H100 = GPUS["h100-80"]


def simulate_work(setup, length):
    return simulate(setup, length, counts_work=True).work


def setup_of(**changes):
    return TrainingSetup(tiny_config("llama", num_hidden_layers=5), **{"method": "sft", **changes})


def test_operations_are_those_of_the_passes():
    setup = setup_of(per_device_train_batch_size=2, activation_budget_bytes=0)
    text, model = setup.config, meta_model(setup)
    layer = sum(weight.numel() for name, weight in model.model.layers[0].named_parameters() if "proj" in name)
    head, tokens = text.vocab_size * text.hidden_size, 2 * LENGTH
    forward = simulate_work(setup, LENGTH)[FORWARD_STAGE]
    assert forward.narrow_flops == 2 * layer * tokens * 5
    # Queries with keys, and their weights with values, of half the pairs.
    width = text.num_attention_heads * text.head_dim
    assert forward.attention_flops == pytest.approx(4 * width * 2 * LENGTH**2 / 2 * 5)
    work = step_work(setup, LENGTH)
    # Forward, again in backward but for the last product of a layer, and two gradients; the head's three products.
    down = text.intermediate_size * text.hidden_size
    linear = 2 * (4 * layer - down) * tokens * 5
    predicted = tokens - 2
    assert work.narrow_flops == pytest.approx(linear + 6 * head * predicted, rel=0.02)


def test_two_shallow_models_tell_the_work_of_a_deep_one():
    setup = setup_of(method="dpo", lora_r=4)
    whole = sum(simulate_work(setup, LENGTH).values(), Work())
    estimated = step_work(setup, LENGTH)
    for name in ("narrow_flops", "attention_flops", "moved", "launches"):
        assert getattr(estimated, name) == pytest.approx(getattr(whole, name), rel=1e-6), name


@pytest.mark.slow
def test_long_sequences_are_carried_on(monkeypatch):
    setup = setup_of()
    counted = step_work(setup, 1024)
    monkeypatch.setattr("trl_fast.planning.peak_estimates.COUNTED_TOKENS", 256)
    carried = step_work(setup, 1024)
    assert carried.narrow_flops == pytest.approx(counted.narrow_flops, rel=0.02)
    assert carried.attention_flops == pytest.approx(counted.attention_flops, rel=0.02)
    assert carried.moved == pytest.approx(counted.moved, rel=0.2)


def test_attention_is_counted_as_long_as_sequences_are(monkeypatch):
    types = ["sliding_attention", "full_attention"]
    config = tiny_config("gemma3_text", num_hidden_layers=2, sliding_window=24, layer_types=types)
    setup = TrainingSetup(config, method="sft")
    counted = step_work(setup, 96)
    monkeypatch.setattr("trl_fast.planning.peak_estimates.COUNTED_TOKENS", 64)
    simulated.cache_clear()
    carried = step_work(setup, 96)
    assert carried.attention_flops == counted.attention_flops > 0
    assert carried.narrow_flops == pytest.approx(counted.narrow_flops, rel=0.05)


@pytest.mark.slow
def test_micro_batches_and_generations_repeat():
    one, four = (step_work(setup_of(gradient_accumulation_steps=count), LENGTH) for count in (1, 4))
    update = simulate_work(setup_of(), LENGTH)[OPTIMIZER_STAGE]
    assert four.narrow_flops == 4 * one.narrow_flops
    assert four.launches < 4 * one.launches - update.launches
    grpo = setup_of(method="grpo", per_device_train_batch_size=8)
    sampling = simulate_work(grpo, LENGTH)[GENERATION_STAGE]
    twice = step_work(grpo.but(num_iterations=2), LENGTH)
    # Half of a generation for each of two updates: 32 tokens of a completion are 32 passes.
    assert step_work(grpo, LENGTH).launches - twice.launches > 0.4 * 32 * sampling.launches


@pytest.mark.slow
def test_layers_that_fit_are_not_computed_again():
    setup = setup_of()
    checkpointed, free = planned_work(setup, LENGTH, None), planned_work(setup, LENGTH, 80 * GIB)
    plain = step_work(setup.but(gradient_checkpointing=False), LENGTH)
    assert plain.narrow_flops == pytest.approx(free.narrow_flops) and free.narrow_flops < checkpointed.narrow_flops


def test_offloading_copies_twice():
    work = step_work(setup_of(activation_offloading=True), LENGTH)
    assert work.host_bytes > 0 == step_work(setup_of(), LENGTH).host_bytes


def test_a_step_takes_as_long_as_what_bounds_it():
    assert Work(narrow_flops=H100.products).seconds(H100) == pytest.approx(1)
    assert Work(moved=2 * H100.memory, attention_flops=H100.products).seconds(H100) == pytest.approx(3)
    assert Work(launches=10, narrow_flops=1).seconds(H100) == pytest.approx(10 * HOST_SECONDS)
    assert Work(host_bytes=100e9).seconds(H100) == pytest.approx(2)
    # NVLink 450 GB/s each way and InfiniBand 50, of which 0.8; what is awaited hides behind nothing.
    assert Work(link_bytes=360e9, narrow_flops=H100.products / 2).seconds(H100) == pytest.approx(1)
    assert Work(network_bytes=40e9).seconds(H100) == pytest.approx(1)
    assert Work(awaited_bytes=360e9, narrow_flops=H100.products).seconds(H100) == pytest.approx(2)
    assert Work(link_bytes=25e9).seconds(GPUS["rtx4090"]) == pytest.approx(1)


@pytest.mark.parametrize("engine", SHARINGS)
def test_micro_batches_multiply_what_an_engine_gathers_and_reduces_in_each(engine):
    one, four = (wire_of(setup_of(num_gpus=8, engine=engine), LENGTH, Passes(trained=n)) for n in (1, 4))
    grow = {name for name in vars(one) if getattr(four, name) > getattr(one, name)}
    expected = {"zero2": {"all_reduce"}, "zero3": {"reduce_scatter"}, "tp": {"all_reduce"}, "sp": {"all_to_all"}}
    # Of the gradients FSDP2 sums the head's in each.
    expected |= {"fsdp1": {"all_gather"}, "fsdp2": {"all_gather", "reduce_scatter"}}
    assert grow == expected.get(engine, set())
    # Eight ranks of a machine talk by its links, sixteen by the network.
    work = wire_work(one, setup_of(num_gpus=8, engine=engine))
    assert work.link_bytes + work.awaited_bytes == pytest.approx(one.bytes) and work.network_bytes == 0
    assert (work.awaited_bytes > 0) == (engine in ("tp", "sp"))
    assert wire_work(one, setup_of(num_gpus=16, engine=engine)).network_bytes == one.bytes


def test_a_pass_without_gradient_gathers_once_more():
    setups = [setup_of(num_gpus=2, method="dpo", precompute_ref_log_probs=known) for known in (True, False)]
    without, with_reference = (planned_wire(setup, LENGTH).all_gather for setup in setups)
    assert with_reference - without == model_sizes(setups[0]).all


def test_gpus_have_what_torch_says_and_rates_below_their_sheets():
    for gpu in GPUS.values():
        assert gpu.usable_bytes < gpu.memory_bytes - GIB // 2 and gpu.products < 1e12 * gpu.tflops
    assert 74 < H100.usable_bytes / GIB < 75
    assert gpu_named("RTX 4090") is GPUS["rtx4090"] and gpu_named("h100") is H100
    with pytest.raises(ValueError, match="gpu='h10' is unknown.*expected one of b200, h200, h100-80"):
        gpu_named("h10")


@pytest.mark.parametrize(
    "name, gibibytes, key",
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80"),
        ("NVIDIA H100 PCIe", 79.2, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA L4", 22.2, "l4"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("Tesla T4", 14.7, None),
    ],
)
def test_the_gpu_here_is_known_by_its_name(name, gibibytes, key):
    assert gpu_of_device(name, int(gibibytes * GIB)) is GPUS.get(key)
