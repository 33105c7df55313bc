"""Tests the plan as a table: shapes, device, dtype and backend in, tiles, kept rows and dtypes out."""

import dataclasses

import pytest
import torch

from benchmarks.file_switches import head_switches
from trl_fast.ops import HeadOptions
from trl_fast.ops.device import DeviceFacts
from trl_fast.ops.head.plan import (
    BLOCKS,
    GROUPS,
    LOGITS,
    NOTHING,
    RAW_BLOCKS,
    UNIT_GRADIENT,
    group_slices,
    plan_head,
    slices,
)
from trl_fast.ops.head.row_kernels import ROW_KERNELS

GIB = 1 << 30
SLOW_CPU, FAST_CPU = (DeviceFacts("cpu", multiplies_bf16=fast) for fast in (False, True))
GPU = DeviceFacts("cuda", multiplies_bf16=True)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
QWEN, TINY = (151936, 1024), (300, 16)


def plan_of(
    facts, backend, dtype, shape, num_rows, keep=LOGITS, workspace=GIB, weight_dtype=None, capped=False, fused=None
):
    return plan_head(
        num_rows,
        shape,
        dtype=dtype,
        weight_dtype=weight_dtype or dtype,
        capped=capped,
        keep=keep,
        kernels=ROW_KERNELS[backend],
        workspace_bytes=workspace,
        facts=facts,
        find_fused=lambda product: fused,
    )


# facts, backend, dtype, shape, rows, keep | product, logits, packed, casts weight, block, kept, tile (rows, columns)
TABLE = [
    (SLOW_CPU, "cpp", F32, TINY, 40, LOGITS, F32, F32, False, False, 40, 40, (40, 300)),
    (SLOW_CPU, "torch", F32, TINY, 40, LOGITS, F32, F32, False, False, 40, 40, (40, 300)),
    (SLOW_CPU, "cpp", BF16, TINY, 40, LOGITS, F32, F32, True, True, 40, 40, (40, 300)),
    (SLOW_CPU, "torch", BF16, TINY, 40, LOGITS, F32, F32, False, True, 40, 40, (40, 300)),
    (FAST_CPU, "cpp", BF16, TINY, 40, LOGITS, BF16, BF16, False, False, 40, 40, (40, 300)),
    (FAST_CPU, "cpp", F16, TINY, 40, LOGITS, F32, F32, True, True, 40, 40, (40, 300)),
    # 2048 columns of float32 would lie in few places of the cache.
    (SLOW_CPU, "cpp", F32, QWEN, 1024, LOGITS, F32, F32, False, False, 1024, 1024, (1024, 1984)),
    (SLOW_CPU, "cpp", F32, QWEN, 1300, GROUPS, F32, F32, False, False, 1300, 1300, (652, 3200)),
    (SLOW_CPU, "cpp", F32, QWEN, 4096, NOTHING, F32, F32, False, False, 4096, 0, (660, 3136)),
    (SLOW_CPU, "cpp", F32, QWEN, 4096, LOGITS, F32, F32, False, False, 4096, 1320, (660, 3136)),
    (SLOW_CPU, "cpp", BF16, QWEN, 4096, LOGITS, F32, F32, True, True, 4096, 2640, (880, 2368)),
    (SLOW_CPU, "cpp", F32, QWEN, 4096, BLOCKS, F32, F32, False, False, 1320, 1320, (660, 3136)),
    (SLOW_CPU, "cpp", F32, QWEN, 4096, GROUPS, F32, F32, False, False, 1320, 1320, (660, 3136)),
    (SLOW_CPU, "cpp", BF16, QWEN, 4096, RAW_BLOCKS, F32, F32, False, True, 880, 880, (880, 2368)),
    (SLOW_CPU, "cpp", F32, QWEN, 4096, UNIT_GRADIENT, F32, F32, False, False, 4096, 0, (660, 3136)),
    (GPU, "cuda", BF16, QWEN, 4096, NOTHING, BF16, F32, True, False, 4096, 0, (512, 131072)),
    (GPU, "cuda", BF16, QWEN, 4096, LOGITS, BF16, F32, True, False, 4096, 2560, (512, 131072)),
    (GPU, "cuda", BF16, QWEN, 4096, BLOCKS, BF16, F32, True, False, 2048, 2048, (512, 131072)),
    (GPU, "cuda", BF16, QWEN, 4096, GROUPS, BF16, F32, True, False, 2560, 2560, (512, 131072)),
    (GPU, "cuda", BF16, QWEN, 4096, UNIT_GRADIENT, BF16, F32, True, False, 2048, 2048, (512, 131072)),
    (GPU, "torch", BF16, QWEN, 4096, LOGITS, BF16, F32, False, False, 4096, 189, (189, 49152)),
    (GPU, "cuda", F32, QWEN, 4096, LOGITS, F32, F32, False, False, 4096, 1280, (256, 151552)),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0].kind}-{row[1]}-{row[2]}-{row[4]}-{row[5]}")
def test_the_table(row):
    facts, backend, dtype, shape, num_rows, keep, *expected = row
    plan = plan_of(facts, backend, dtype, shape, num_rows, keep)
    found = [plan.product_dtype, plan.logits_dtype, plan.packed, plan.casts_weight, plan.block_rows, plan.kept_rows]
    assert [*found, (plan.scoring.num_rows, plan.scoring.num_columns)] == expected


@pytest.mark.parametrize("facts, columns", [(SLOW_CPU, 2368), (GPU, 151936)], ids=["cpu", "gpu"])
def test_kept_logits_lie_in_the_tiles_that_score_them_or_on_a_gpu_in_one(facts, columns):
    plan = plan_of(facts, "cuda" if facts is GPU else "cpp", BF16, QWEN, 4096)
    assert plan.kept_columns == columns
    smaller = plan.scoring_tiles(100, 100)
    assert smaller.num_columns == (columns if facts is SLOW_CPU else 131072)


def test_a_softcap_is_never_packed_and_the_fused_kernel_scores_products_of_16_bits():
    class Fused:
        columns = 256

    fused = plan_of(GPU, "cuda", BF16, QWEN, 64, fused=Fused)
    assert fused.fused is Fused and fused.chunk == 256
    capped = plan_of(GPU, "cuda", BF16, QWEN, 64, fused=Fused, capped=True)
    assert capped.fused is Fused and not capped.packed
    for options in ({"dtype": F32}, {"facts": SLOW_CPU}):
        given = {"facts": GPU, "backend": "cuda", "dtype": BF16, "shape": QWEN, "num_rows": 64, "fused": Fused}
        plan = plan_of(**{**given, **options})
        assert plan.fused is None and plan.chunk == 2048
        assert plan.packed == (options.get("facts") is SLOW_CPU)


@pytest.mark.parametrize(
    ("workspace", "columns"),
    # Half of it holds the copy of all columns; else a quarter holds a slice of even ones; at least one chunk of them.
    [(GIB, QWEN[0]), (300 << 20, 30720), (100 << 20, 12288), (3 << 20, 2048)],
)
def test_a_gpu_casts_a_weight_whole_where_that_fits_the_workspace(workspace, columns):
    plan = plan_of(GPU, "cuda", BF16, QWEN, 64, workspace=workspace, weight_dtype=F32)
    assert plan.limits.weight_columns == columns and plan.casts_whole == (columns == QWEN[0])
    assert {part.stop - part.start for part in plan.weight_slices[:-1]} <= {columns}
    assert plan.scoring.num_columns <= columns and plan.gradient_tiles(64, 64, 0, in_place=True).num_columns == columns
    copy = columns * QWEN[1] * 2
    assert plan.limits.workspace_bytes == max(workspace - copy, 4 * QWEN[0])
    # A weight that is not cast takes nothing, and is never cut.
    same = plan_of(GPU, "cuda", BF16, QWEN, 64, workspace=workspace)
    assert same.limits.weight_columns == QWEN[0] and same.limits.workspace_bytes == workspace


def test_a_gradient_in_place_needs_one_tile_on_a_gpu_only():
    gpu, cpu = plan_of(GPU, "cuda", BF16, QWEN, 512), plan_of(SLOW_CPU, "cpp", F32, QWEN, 512)
    assert gpu.gradient_tiles(512, 512, 1 << 20, in_place=True)[:2] == (512, 151936)
    tiles = cpu.gradient_tiles(512, 512, 1 << 20, in_place=True)
    assert tiles.num_columns == cpu.kept_columns < 151936


def test_tiles_cover_all_rows_and_columns_in_order():
    plan = plan_of(SLOW_CPU, "cpp", F32, QWEN, 4096)
    rows, columns = plan.scoring.rows, plan.scoring.columns
    for tiles, total in ((rows, 4096), (columns, 151936)):
        assert [number for tile in tiles for number in range(tile.start, tile.stop)] == list(range(total))
    # A tile of rows is kept as a whole or not at all.
    assert plan.kept_rows in [tile.stop for tile in rows]


def test_a_simulation_computes_the_first_two_and_the_last_of_tiles_that_are_alike():
    whole = plan_of(SLOW_CPU, "cpp", F32, QWEN, 4096, NOTHING)
    some = plan_of(dataclasses.replace(SLOW_CPU, first_tiles_only=True), "cpp", F32, QWEN, 4096, NOTHING)
    assert some.scoring.columns == [*whole.scoring.columns[:2], whole.scoring.columns[-1]]
    assert some.scoring.rows == [*whole.scoring.rows[:2], whole.scoring.rows[-1]]


def test_a_workspace_without_room_for_a_row_is_refused_by_name():
    with pytest.raises(ValueError, match="workspace_bytes: 1199 bytes hold no row of logits; a row takes 1200 bytes"):
        plan_of(SLOW_CPU, "cpp", F32, TINY, 4, workspace=1199)


def test_blocks_and_groups():
    assert slices(2, 7, 3) == [slice(2, 5), slice(5, 7)] and slices(0, 0, 5) == []
    assert group_slices([2, 3, 9, 1, 1], 5) == [slice(0, 5), slice(5, 14), slice(14, 16)]
    assert group_slices([], 5) == [] and group_slices([0, 0], 5) == []
    # The rest of a tile needs room too, but none is there after the last row.
    assert group_slices([4, 3, 4, 2], 8, step=4) == [slice(0, 7), slice(7, 13)]
    assert group_slices([5, 2, 4, 2], 8, step=4) == [slice(0, 7), slice(7, 13)]
    assert group_slices([3, 3, 3, 9], 8, step=4) == [slice(0, 6), slice(6, 9), slice(9, 18)]


@pytest.mark.parametrize("facts", [SLOW_CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("num_rows", [1, 300, 4096, 5000])
@pytest.mark.parametrize("workspace", [4 << 20, GIB, 8 * GIB])
def test_a_row_is_scored_in_the_same_tile_whatever_is_kept(facts, num_rows, workspace):
    given = (facts, "cuda" if facts is GPU else "cpp", BF16, QWEN, num_rows)
    plans = [plan_of(*given, keep, workspace) for keep in range(6)]
    height = plans[0].scoring.num_rows
    for plan in plans:
        assert (plan.scoring.num_rows, plan.scoring.num_columns) == (height, plans[0].scoring.num_columns)
        if plan.kept_rows < num_rows:
            assert plan.kept_rows % height == 0
        if plan.block_rows < num_rows and plan.block_rows:
            assert plan.block_rows % height == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_grad": "dense"}, "head_grad: unknown value 'dense'"),
        ({"head_grad": "sparse", "sparse_threshold": 0.0}, "sparse_threshold must lie between 0 and 1, got 0.0"),
    ],
)
def test_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        HeadOptions(**options).check(torch.device("cpu"))


def test_a_call_of_a_small_head_moves_between_files_at_most_fifteen_times():
    """So that it can be followed: the plan is made once, and the sweeps decide nothing."""
    moves = head_switches()
    assert {name: len(found) <= 15 for name, found in moves.items()} == {"head, forward": True, "head, backward": True}
