"""Tests what a step takes by default: by the problem alone, and no more than TRL has at that time or later."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.support.models import tiny_model
from trl_fast.modeling.memory_budgets import default_activation_budget, head_workspace
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.ops.device import DeviceFacts, DeviceMemory, simulated_device

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CPU = DeviceFacts("cpu", multiplies_bf16=False)
GPU = DeviceFacts("cuda", multiplies_bf16=True)
F32, BF16 = torch.float32, torch.bfloat16
VOCAB, HIDDEN, MLP = 151936, 1024, 4096
GRADIENT = 2 * VOCAB * HIDDEN


@pytest.fixture(scope="module")
def model():
    """A model whose MLP is said to be as wide as a large one's."""
    model = tiny_model()
    model.config.intermediate_size = MLP
    return model


def workspace(model, facts, num_rows, dtype=BF16, trains=True, num_tokens=0, product=None):
    weight = torch.empty(VOCAB, HIDDEN, dtype=dtype, device="meta", requires_grad=trains)
    with simulated_device(facts, "meta"):
        return head_workspace(model, weight, product or dtype, num_rows, num_tokens)


@pytest.mark.parametrize("num_rows, expected", [(1, 16 * 4 * VOCAB), (512, 512 * 384 * KIB), (8192, GIB)])
def test_the_workspace_on_a_cpu_grows_with_the_rows(model, num_rows, expected):
    for dtype, trains in ((F32, True), (BF16, True), (F32, False)):
        assert workspace(model, CPU, num_rows, dtype, trains, num_tokens=1 << 20) == expected


@pytest.mark.parametrize(
    "num_rows, dtype, trains, num_tokens, expected",
    [
        # As TRL's tiles of logits.
        (512, BF16, False, 0, 512 * 56 * KIB),
        (8192, BF16, False, 0, 224 * MIB),
        (8192, F32, True, 0, 224 * MIB),
        # As the MLP in backward.
        (8192, BF16, False, 8192, 8192 * 9 * MLP),
        (8192, BF16, False, 1 << 20, GIB),
        (8192, F32, True, 1 << 17, (1 << 17) * 9 * MLP),
        (8192, F32, True, 1 << 20, 8 * GIB),
        # As a gradient of 16 bits besides.
        (8192, BF16, True, 0, 224 * MIB + GRADIENT),
        (512, BF16, True, 8192, 512 * 56 * KIB + GRADIENT),
    ],
)
def test_the_workspace_on_a_gpu(model, num_rows, dtype, trains, num_tokens, expected):
    assert workspace(model, GPU, num_rows, dtype, trains, num_tokens) == expected


def test_a_gpu_that_casts_the_weight_has_room_for_a_tile_of_it(model):
    for rows in (512, 8192):
        cast, same = (workspace(model, GPU, rows, F32, product=dtype) for dtype in (BF16, F32))
        assert cast - same == 32768 * HIDDEN * 2
        assert workspace(model, CPU, rows, F32, product=BF16) == workspace(model, CPU, rows, F32)


@pytest.mark.parametrize("facts", [CPU, GPU], ids=["cpu", "gpu"])
def test_free_memory_has_no_say(model, facts):
    memory = DeviceMemory(free=GIB, total=80 * GIB, allocated=0, peak=0)
    full = dataclasses.replace(facts, read_memory=lambda: memory)
    assert workspace(model, full, 4096) == workspace(model, facts, 4096)


def test_a_reference_where_nothing_trains_has_the_workspace_of_its_policy(model):
    reference = copy.deepcopy(model).requires_grad_(False)
    assert workspace(reference, GPU, 4096, trains=False) == workspace(model, GPU, 4096, trains=True)
    assert workspace(model, GPU, 4096, trains=False) < workspace(model, GPU, 4096, trains=True)


def test_an_mlp_in_tiles_leaves_the_head_no_more_than_tiles_of_logits(model):
    tiled = copy.deepcopy(model)
    tile_mlps(tiled, 64)
    assert workspace(tiled, GPU, 4096, trains=False, num_tokens=1 << 20) == 224 * MIB


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (8, 8 * 576 * KIB),
        (4096, 4096 * 576 * KIB),
        (8192, 4096 * 576 * KIB),
        # TRL's tiles of logits grow no more, a layer in backward does.
        (24576, 4096 * 960 * KIB - 24576 * 6 * (MLP + HIDDEN) * 4),
        (1 << 20, 0),
    ],
)
def test_results_that_stay_on_a_cpu_grow_with_the_tokens_while_a_layer_is_small(model, tokens, expected):
    hidden = torch.empty(1).expand(2, tokens // 2, HIDDEN)
    # An adapter has few gradients: where there are tiles they have no say.
    assert default_activation_budget(model, hidden, 0) == expected
    with simulated_device(GPU):
        assert default_activation_budget(model, hidden, 0) == 0


@pytest.mark.parametrize(
    ("tokens", "gradients", "expected"),
    [
        (8, 4 * GIB, 8 * 384 * KIB),
        (8192, 4 * GIB, GIB),
        # What gradients will take above a layer in backward and the inputs of two.
        (1024, 384 * MIB, 384 * MIB - 1024 * 6 * (MLP + HIDDEN) * 4 - 2 * 1024 * HIDDEN * 4),
        # An adapter's, or gradients that are there already.
        (1024, MIB, 0),
        (8, 0, 0),
    ],
)
def test_where_no_head_reads_the_vocabulary_results_stay_in_the_place_of_gradients(model, tokens, gradients, expected):
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    assert classifier.config.num_hidden_layers == 2
    hidden = torch.empty(1).expand(1, tokens, HIDDEN)
    assert default_activation_budget(classifier, hidden, gradients) == expected
    with simulated_device(GPU):
        assert default_activation_budget(classifier, hidden, gradients) == 0


def test_layers_of_16_bits_and_mlps_in_tiles_leave_more_room_for_results(model):
    hidden = torch.empty(1).expand(1, 30000, HIDDEN)
    plain = default_activation_budget(model, hidden, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert default_activation_budget(model, hidden, 0) > plain
    tiled = copy.deepcopy(model)
    tile_mlps(tiled, 64)
    assert default_activation_budget(tiled, hidden, 0) > plain
