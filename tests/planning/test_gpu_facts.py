"""What is different on a GPU, and that nothing of it stays."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface

from trl_fast.modeling import activation_offloading, tiled_mlp, tree_attention
from trl_fast.ops import attention_merge, matmul, memory_pool
from trl_fast.ops.head import gradients, plan, row_blocks
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.row_kernels import ROW_KERNELS
from trl_fast.ops.head.sparse_kernels import SPARSE_KERNELS
from trl_fast.planning.gpu_facts import PADDED_ATTENTION, choices_of, flash_workspace
from trl_fast.planning.memory_tracker import MemoryTracker

WORKSPACE = 1 << 30


def tiling(device):
    with FakeTensorMode(), choices_of(device, MemoryTracker()):
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16)
        assert device == "cpu" or matmul.gemm_dtype(weight) == torch.bfloat16
        return plan.Head(weight, None, LogitTransform(), torch.bfloat16, "torch", WORKSPACE).tiling(3072)


def test_tiles_of_a_gpu_know_no_cache():
    rows, columns = tiling("gpu")
    # Logits in float32, whole chunks of those that are packed.
    assert rows == 3072 and columns == WORKSPACE // 4 // (3072 * 4) // 2048 * 2048
    assert 2 * tiling("cpu").rows * tiling("cpu").columns <= 16 << 20


def test_everything_is_put_back():
    def state():
        limits = (plan.tile_policy, memory_pool._POOLED_FROM_BYTES)
        on_gpu = (
            plan.logits_dtype,
            gradients.mm_into,
            gradients.add_mm,
            row_blocks.mm_into,
            matmul._cpu_multiplies_bf16,
        )
        classes = (tree_attention.CpuRowAttention, activation_offloading.copies_of, activation_offloading.is_on_device)
        tiles = (gradients.spans, tiled_mlp._tiles)
        padded = AttentionInterface()[PADDED_ATTENTION]
        merge = attention_merge._merge_reference
        return limits, on_gpu, merge, tiles, classes, padded, dict(ROW_KERNELS), dict(SPARSE_KERNELS)

    before = state()
    for device in ("gpu", "cpu"):
        with choices_of(device, MemoryTracker()):
            assert state() != before
        assert state() == before
    assert tree_attention._varlen_calls.cache_info().currsize == 0


def test_flash_backward_takes_float32_sums_and_ungrouped_gradients():
    query, key = torch.empty(1000, 8, 64, dtype=torch.bfloat16), torch.empty(1000, 2, 64, dtype=torch.bfloat16)
    backward = torch.ops.aten._flash_attention_backward.default
    sums, rows = 4 * query.numel(), 4 * 1000 * 8
    assert flash_workspace(backward, (query, query, query)) == sums + rows
    assert flash_workspace(backward, (query, query, key)) == sums + rows + 2 * 2 * query.numel()
    assert flash_workspace(torch.ops.aten.mm.default, (query, query, key)) == 0


def test_merging_attention_takes_no_temporaries_on_a_gpu(monkeypatch):
    """The PyTorch that stands in for the kernel would have them."""

    def temporaries(*_):
        raise AssertionError("the stand-in ran")

    monkeypatch.setattr(attention_merge, "_merge_reference", temporaries)
    out, lse = torch.empty(10, 8, 64, dtype=torch.bfloat16), torch.empty(8, 10)
    given = (out, lse, out[:6], lse[:, :6], torch.empty(10, dtype=torch.int32))
    with pytest.raises(AssertionError, match="the stand-in ran"):
        attention_merge.merge_attention(*given)
    with choices_of("gpu", MemoryTracker()):
        merged, merged_lse = attention_merge.merge_attention(*given)
    assert merged.shape == out.shape and merged.dtype == out.dtype and merged_lse.shape == lse.shape
