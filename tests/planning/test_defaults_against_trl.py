"""Holds that a step of ours needs no more memory than TRL 1.16's, both with their defaults, by simulation.

Of what a GPU has free beyond the step ours uses more: layers that it leaves uncheckpointed there. That is no part of
what a step needs (docs/models.md).
"""

import pytest

from trl_fast.planning.memory_timeline import highest
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.peak_estimates import stage_peaks
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TRL, TrainingSetup

pytestmark = pytest.mark.plans

QWEN, LLAMA = ("qwen2.5-0.5b", None), ("llama-3.1-8b", 16)
MODELS = [QWEN, ("llama-3.2-1b", None), LLAMA]
# Micro-batch and length; the trainers' own default is 8 x 1024.
SHAPES = [(1, 512), (1, 2048), (8, 1024), (1, 16384)]
GROUPS = [(8, 512), (8, 2048)]

CASES = [
    (method, *model, dtype, device, *shape, 1)
    for method in ("sft", "dpo", "grpo")
    for model in MODELS
    for dtype in ("float32", "bfloat16")
    for device in ("gpu", "cpu")
    for shape in (GROUPS if method == "grpo" else SHAPES)
]
# Gradients are there from the second micro-batch on: what they will take is no room for the head any more.
CASES += [
    (method, *model, dtype, "gpu", 1, length, 4)
    for method in ("sft", "dpo")
    for model in MODELS
    for dtype in ("float32", "bfloat16")
    for length in (512, 3000, 8192)
]
# A reward model's step has no tiles of logits: what checkpointing keeps on a CPU has to fit elsewhere.
CASES += [
    ("reward", *model, "float32", "cpu", batch, length, accumulation)
    for model in (QWEN, ("qwen2.5-0.5b", 16))
    for batch, length in ((2, 2048), (8, 1024))
    for accumulation in (1, 4)
]
# Models of two layers, whose peak is in or near the head.
SHALLOW = [
    ("sft", *QWEN, "bfloat16", "gpu", 8, 1024, 1),
    ("sft", *QWEN, "float32", "gpu", 1, 3000, 4),
    ("sft", *QWEN, "float32", "cpu", 1, 2048, 1),
    ("dpo", *LLAMA, "bfloat16", "gpu", 1, 512, 1),
    ("grpo", *QWEN, "bfloat16", "gpu", 8, 512, 1),
    ("reward", *QWEN, "float32", "cpu", 8, 1024, 1),
    ("reward", "qwen2.5-0.5b", 16, "float32", "cpu", 2, 512, 1),
]


def setup_of(method, model, lora_r, dtype, device, batch, accumulation, layers=None):
    config = model_config(model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    return TrainingSetup(
        config,
        method=method,
        lora_r=lora_r,
        dtype=dtype,
        device=device,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )


def tables(setup, length):
    """Bytes that say where in a row without padding its sequences are: padded rows of one length need none.

    Rotary positions of each token, where TRL's rows share those of one (a sine and a cosine for each channel of a
    head); of pairs and groups, which tokens are queries, keys and branches (two int64, an int32); and where sequences
    begin, as any tensor at least 512 bytes.
    """
    config = setup.config
    rows = setup.per_device_train_batch_size * (2 if setup.method in ("dpo", "reward") else 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = (rows - 1) * length * 2 * head_dim * setup.torch_dtype.itemsize
    return positions + (0 if setup.method == "sft" else rows * length * 20) + 4 * 512


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.slow
def test_no_step_needs_more_memory_than_trls(case):
    *described, length, accumulation = case
    setup = setup_of(*described, accumulation)
    ours, theirs = (highest(stage_peaks(one, length)).bytes for one in (setup, setup.but(system=TRL)))
    assert ours <= theirs + tables(setup, length)


@pytest.mark.parametrize("case", SHALLOW, ids=str)
def test_steps_of_two_layers_need_no_more_memory_than_trls(case):
    *described, length, accumulation = case
    setup = setup_of(*described, accumulation, layers=2)
    ours, theirs = (highest(simulate(one, length).stage_peaks()).bytes for one in (setup, setup.but(system=TRL)))
    assert ours <= theirs + tables(setup, length)
