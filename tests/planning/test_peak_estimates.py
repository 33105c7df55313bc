"""Peaks from shallow models against whole ones, and the search for the longest context."""

from dataclasses import replace

import pytest

from support.models import tiny_config
from trl_fast.planning.device_facts import planned_facts
from trl_fast.planning.fake_models import decoder_layers, meta_model
from trl_fast.planning.memory_timeline import (
    FORWARD_STAGE,
    GRADIENTS,
    HEAD_STAGE,
    KINDS,
    MIDDLE_LAYERS,
    OPTIMIZER,
    REFERENCE,
    WEIGHTS,
    WORKSPACE,
    Peak,
    highest,
)
from trl_fast.planning.peak_estimates import LENGTH_STEP, LONGEST, TOLERANCE, estimate, longest_context, stage_peaks
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import FULL_LOGITS, TRL, TrainingSetup

pytestmark = pytest.mark.plans

TEXT = TrainingSetup(tiny_config("llama"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {
                "lora_r": 4,
                "lora_target_modules": ("q_proj", "up_proj"),
                "tiled_mlp": 64,
                "activation_offloading": True,
            },
            marks=pytest.mark.slow,
        ),
        {"gradient_checkpointing": False, "activation_offloading": True},
        pytest.param({"gradient_checkpointing": False, "method": "sft", "dtype": "float32"}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"activation_budget_bytes": 0, "device": "cpu"}, marks=pytest.mark.slow),
        # All results of the first layer, attention of all.
        pytest.param(
            {"activation_budget_bytes": 150_000, "head_workspace_bytes": 1 << 16, "device": "cpu"},
            marks=pytest.mark.slow,
        ),
        {"activation_budget_bytes": 20_000, "dtype": "float32", "method": "sft", "device": "cpu"},
        pytest.param({"method": "reward", "batch_layout": "padded"}, marks=pytest.mark.slow),
        {"system": TRL, "precompute_ref_log_probs": True},
        pytest.param({"method": "ppo", "per_device_train_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"method": "ppo", "activation_budget_bytes": 20_000, "device": "cpu"}, marks=pytest.mark.slow),
        pytest.param({"method": "rloo", "per_device_train_batch_size": 4}, marks=pytest.mark.slow),
        {"method": "kto", "per_device_train_batch_size": 2},
        pytest.param({"system": FULL_LOGITS, "method": "sft"}, marks=pytest.mark.slow),
        {"head_grad": "sparse", "device": "cpu", "precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_two_shallow_models_tell_about_a_deep_one(changes):
    depth = 6 if "activation_offloading" in changes else 5
    setup = TrainingSetup(tiny_config("llama", num_hidden_layers=depth), **changes)
    whole, estimated = simulate(setup, 96).stage_peaks(), stage_peaks(setup, 96)
    assert highest(estimated).stage == highest(whole).stage
    for stage, peak in estimated.items():
        if stage == FORWARD_STAGE and 0 < (setup.activation_budget or 0) < 1 << 20:
            # A layer's own results are there while it runs; all of them are counted.
            surplus = sum(size for _, size in simulate(setup, 96, 2).results[1])
            assert 0 <= peak.bytes - whole[stage].bytes <= surplus
        else:
            assert peak.bytes == pytest.approx(whole[stage].bytes, rel=0.005), stage
    assert set(whole) - set(estimated) <= {MIDDLE_LAYERS}


def test_what_stays_is_counted_as_what_it_is():
    setup = TrainingSetup(tiny_config("llama"), dtype="float32", device="cpu")
    size = sum(weight.nbytes for weight in meta_model(setup).parameters())
    levels = simulate(setup, 64).levels
    for kind, copies in ((WEIGHTS, 1), (REFERENCE, 1), (GRADIENTS, 1), (OPTIMIZER, 2)):
        assert levels[KINDS.index(kind)].max() == pytest.approx(copies * size, rel=0.01), kind


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tiled_mlp": 32, "head_workspace_bytes": 1 << 20}, marks=pytest.mark.slow),
        {"method": "sft", "head_workspace_bytes": 1 << 17},
    ],
    ids=str,
)
def test_some_tiles_and_row_blocks_tell_about_all(changes, monkeypatch):
    setup = TrainingSetup(tiny_config("llama", vocab_size=4096), **changes)
    some = simulate(setup, 300)
    facts = replace(planned_facts("gpu"), first_tiles_only=False)
    monkeypatch.setattr("trl_fast.planning.simulated_step.planned_facts", lambda *_, **__: facts)
    every = simulate(setup, 300)
    for stage, peak in every.stage_peaks().items():
        assert some.stage_peaks()[stage].bytes == pytest.approx(peak.bytes, rel=0.002), stage
    assert some.levels.shape[1] < every.levels.shape[1] / 2


def test_layers_that_differ_are_all_simulated():
    config = tiny_config("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[0], num_experts=2, num_experts_per_tok=1)
    setup = TrainingSetup(config, method="sft")
    assert estimate(setup, 64).bytes == simulate(setup, 64).peak().bytes


def peaks_of(*lines):
    """Returns a stand-in for simulations: memory of stages as (base, bytes per token) or a function of the length."""
    calls = []

    def found(_setup, length):
        calls.append(length)
        sizes = [line(length) if callable(line) else line[0] + line[1] * length for line in lines]
        return {f"stage {i}": Peak({**dict.fromkeys(KINDS, 0), WORKSPACE: size}, "") for i, size in enumerate(sizes)}

    return found, calls


@pytest.mark.parametrize("start", [100, 5000, 700_000])
@pytest.mark.parametrize(
    "lines, limit, expected",
    [
        ([(1000, 7)], 100_000, 14_142),
        # The second line overtakes the first far beyond the first lengths.
        ([(50_000, 1), (0, 9)], 900_000, 100_000),
        # A head whose memory stops growing.
        ([lambda n: 100 * min(n, 4000), (1000, 5)], 500_000, 99_800),
        # Quadratic: where lines mislead.
        ([lambda n: n * n], 10**9, 31_622),
    ],
)
def test_the_longest_context(lines, limit, expected, start):
    found_peaks, calls = peaks_of(*lines)
    found = longest_context(TEXT, limit, start, found_peaks)
    assert expected * (1 - TOLERANCE) - LENGTH_STEP <= found.max_length <= expected
    assert found.peak.bytes <= limit and not found.at_least
    assert len(calls) < 20 and len(set(calls)) == len(calls)


def test_nothing_fits():
    found = longest_context(TEXT, 10, 1024, peaks_of((100, 1))[0])
    assert found.max_length == 0 and found.peak is None


def test_everything_fits():
    found = longest_context(TEXT, 10**9, 1024, peaks_of((100, 1))[0])
    assert found.max_length == LONGEST and found.at_least


def test_the_head_has_no_16_bit_copies_of_the_layers_beside_it():
    config = tiny_config("llama", vocab_size=8192, hidden_size=64, num_hidden_layers=4)
    setup = TrainingSetup(config, method="sft", dtype="float32", device="cpu", activation_budget_bytes=0)
    layer = decoder_layers(meta_model(setup))[0]
    weights = sum(weight.nbytes for weight in layer.parameters())
    fewer, more = (simulate(setup, 16, layers).stage_peaks()[HEAD_STAGE].bytes for layers in (2, 4))
    # Weights and two averages, and the input that checkpointing keeps; copies would be half as much as weights.
    assert (more - fewer) / 2 < 3.2 * weights
