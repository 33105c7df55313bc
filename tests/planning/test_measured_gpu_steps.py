"""Plans against steps that were measured on an H200 (benchmarks/results/gpu): memory, and the time it was busy."""

import json

import pytest

from support.source_tree import ROOT
from trl_fast.planning.gpu_facts import GPUS
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.peak_estimates import estimate
from trl_fast.planning.step_times import step_work
from trl_fast.planning.training_setup import OURS, TRL, TrainingSetup

MEASURED = ROOT / "benchmarks/results/gpu/h200_first_light.jsonl"
# The phase, and the share of the time that the GPU was busy (docs/gpu-h200.md). Checkpointed steps of ours are others
# since: they kept a GiB of results then.
STEPS = {
    "step dpo trl": 0.68,
    "step sft trl": 0.46,
    "step dpo trl no_checkpointing": 0.81,
    "step dpo trl_fast no_checkpointing": 0.58,
}


@pytest.mark.parametrize("phase", STEPS)
def test_steps_on_an_h200(phase, monkeypatch):
    # Scores took two steps, and layers were not fused.
    monkeypatch.setattr("trl_fast.kernels.linear_scores.TILES", {})
    facts = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    (found,) = (fact for fact in facts if fact.get("phase") == phase and "peak_bytes" in fact)
    method, library = found["what"].split()
    shape = found["shape"]
    length = shape["prompt"] + shape["completion"]
    setup = TrainingSetup(
        model_config("qwen2.5-0.5b"),
        method=method,
        system=TRL if library == "trl" else OURS,
        per_device_train_batch_size=shape["batch"],
        prompt_share=shape["prompt"] / length,
        gradient_checkpointing=found["checkpointing"],
        # The default of that time.
        head_workspace_bytes=1 << 30,
        fused_layers=False,
    )
    assert estimate(setup, length).bytes == pytest.approx(found["peak_bytes"], rel=0.02)
    bounds = step_work(setup, length).bounds(GPUS["h200"])
    # A bound from below: what is not counted are TRL's kernels that read logits, and how well kernels do.
    assert 0.75 < bounds["the GPU"] * 1e3 / (STEPS[phase] * found["ms"]) < 1
    assert 0.8 < bounds["launches"] * 1e3 / found["ms"] < 1.2
