"""Tests what a step takes by default: by the problem alone, and no more than TRL's tiles of logits."""

import dataclasses

import pytest
import torch

from trl_fast.modeling.memory_budgets import default_activation_budget, head_workspace
from trl_fast.ops.device import DeviceFacts, DeviceMemory

KIB, GIB = 1 << 10, 1 << 30
CPU = DeviceFacts("cpu", multiplies_bf16=False)
VOCAB, HIDDEN = 151936, 1024


def weight_of(trains=True, dtype=torch.float32):
    return torch.empty(VOCAB, HIDDEN, dtype=dtype, device="meta", requires_grad=trains)


@pytest.mark.parametrize("num_rows, expected", [(1, 16 * 4 * VOCAB), (512, 512 * 384 * KIB), (8192, GIB)])
def test_the_workspace_on_a_cpu_grows_with_the_rows(num_rows, expected):
    assert {head_workspace(num_rows, weight_of(trains), CPU) for trains in (True, False)} == {expected}


def test_free_memory_has_no_say():
    memory = DeviceMemory(free=GIB, total=80 * GIB, allocated=0, peak=0)
    there = dataclasses.replace(CPU, read_memory=lambda: memory)
    assert head_workspace(4096, weight_of(), there) == head_workspace(4096, weight_of(), CPU)


@pytest.mark.parametrize("tokens, expected", [(4, 8 * 384 * KIB), (1 << 20, GIB)])
def test_results_kept_on_a_cpu_grow_with_the_tokens(tokens, expected):
    assert default_activation_budget(torch.empty(1).expand(2, tokens, 1)) == expected
