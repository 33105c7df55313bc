"""The four lines at the start of a run, from facts alone."""

from dataclasses import replace

import pytest

from trl_fast.trainers.run_report.facts import KernelFacts, ModelFacts, RunFacts, StepFacts, start_lines
from trl_fast.trainers.run_report.forecast import Forecast
from trl_fast.trainers.run_report.quantities import count_text, share_text, size_text, time_text
from trl_fast.trainers.run_report.resident_memory import ResidentMemory

FACTS = RunFacts(
    version="0.1.0",
    method="dpo",
    model=ModelFacts("Qwen3-4B", 4_022_468_096, 4_022_468_096, "bfloat16"),
    kernels=KernelFacts("cuda", "compiled CUDA kernels", "shared_prefix", None, 0.414, 64, 512.0),
    checkpointing="activation checkpointing on",
    resident=ResidentMemory(16 << 30, 8 << 30, 16 << 30),
    is_sharded=False,
    forecast=None,
    steps=StepFacts(1000, 0, 1.0, 4, 4, 2, "pairs"),
)


def texts(facts):
    return dict(start_lines(facts))


def test_the_four_lines():
    assert start_lines(FACTS) == [
        ("trl_fast", "0.1.0, dpo: Qwen3-4B, 4.02B parameters, bfloat16, 100% trained"),
        (
            "kernels",
            "head by cuda (compiled CUDA kernels), rows shared_prefix: 41% fewer tokens than padded rows "
            "(first 64 rows)",
        ),
        (
            "memory",
            "activation checkpointing on; 40.00 GiB for weights, gradients and optimizer states; activations come "
            "on top",
        ),
        ("steps", "1,000 in 1 epoch; a step: 32 pairs (4 × 4 × 2), about 16.4k tokens; in all 16.4M"),
    ]


def test_an_adapter_says_its_kind_and_share():
    model = replace(FACTS.model, trained=12_345_678, adapter="LoRA")
    assert texts(replace(FACTS, model=model))["trl_fast"].endswith("LoRA of 12.3M (0.31% trained)")


def test_the_reason_for_a_slower_path_stands_in_its_line():
    kernels = replace(FACTS.kernels, layout="padded", layout_reason="Foo has ALiBi position biases", saved=0.0)
    said = texts(replace(FACTS, kernels=kernels))["kernels"]
    assert "rows padded, because Foo has ALiBi position biases: as many tokens as padded rows" in said


def test_a_stream_and_a_user_s_collator_promise_no_savings():
    kernels = replace(FACTS.kernels, saved=None, counted_rows=0, tokens_a_row=None)
    said = texts(replace(FACTS, kernels=kernels))
    assert said["kernels"].endswith("rows shared_prefix") and said["steps"].endswith("(4 × 4 × 2)")


def test_one_pair_is_no_pairs():
    steps = replace(FACTS.steps, per_device=1, accumulation=1, processes=1)
    assert "; a step: 1 pair (1 × 1 × 1)" in texts(replace(FACTS, steps=steps))["steps"]


def test_sampled_completions_share_their_prompt():
    steps = replace(FACTS.steps, unit="completions", completions=8, new_tokens=256, first_step=10, epochs=None)
    kernels = replace(FACTS.kernels, saved=None, tokens_a_row=None)
    said = texts(replace(FACTS, steps=steps, kernels=kernels))
    assert said["kernels"].endswith("rows shared_prefix: a prompt stands once for its 8 completions")
    assert said["steps"] == (
        "1,000, from step 10; a step: 32 completions (4 × 4 × 2), 8 of a prompt, each of at most 256 tokens"
    )


@pytest.mark.parametrize(
    ("forecast", "expected"),
    [
        (Forecast(22 << 30, 1.5, "estimate for an H100"), "22.00 GiB expected (estimate for an H100)"),
        (Forecast(None, None, "streams are not planned"), "activations come on top (streams are not planned)"),
    ],
)
def test_a_forecast_is_said_with_its_note(forecast, expected):
    assert texts(replace(FACTS, forecast=forecast))["memory"].endswith(expected)


def test_what_is_not_known_of_memory_is_said():
    facts = replace(FACTS, resident=ResidentMemory(1 << 30, 1 << 30, None), is_sharded=True)
    expected = "2.00 GiB for weights and gradients, without optimizer states, before they are sharded"
    assert expected in texts(facts)["memory"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (count_text(950), "950"),
        (count_text(9_999), "9,999"),
        (count_text(134_515_008), "134.5M"),
        (count_text(8_030_261_248), "8.03B"),
        (size_text(512 << 20), "512 MiB"),
        (size_text(3 << 29), "1.50 GiB"),
        (size_text(3 << 10), "3 KiB"),
        (time_text(0.1084), "108 ms"),
        (time_text(4.25), "4.2 s"),
        (time_text(192), "3 min 12 s"),
        (time_text(7500), "2 h 5 min"),
        (share_text(999, 1000), ">99%"),
        (share_text(1, 1000), "0.1%"),
        (share_text(7, 7), "100%"),
    ],
)
def test_quantities(written, expected):
    assert written == expected
