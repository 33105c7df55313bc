"""Tests what is different on a planned GPU, and that the plan exchanges nothing of the code that it runs."""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trl_fast.planning
from support.models import tiny_config
from trl_fast.modeling.attention.cpu import CompiledRowAttention
from trl_fast.modeling.attention.flex import FlexAttention
from trl_fast.modeling.attention.row_attention import AttentionSpec, RowMask
from trl_fast.modeling.attention.tree_attention import choose_kernels, tree_attention
from trl_fast.modeling.attention.varlen import CudaRowAttention
from trl_fast.ops import attention_merge
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.ops.head.plan import NOTHING, plan_head
from trl_fast.ops.head.row_kernels import ROW_KERNELS
from trl_fast.planning.device_facts import (
    GPU_KERNELS,
    KINDS_BY_CODE,
    DeviceMeter,
    flash_workspace,
    mixed_dtype_workspace,
    planned_facts,
)
from trl_fast.planning.memory_timeline import ATTENTION, KINDS
from trl_fast.planning.memory_tracker import MemoryTracker
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup

WORKSPACE = 1 << 30
CPU = torch.device("cpu")
PLANNING = Path(trl_fast.planning.__file__).parent


def tiling(device):
    with simulated_device(planned_facts(device)):
        hidden, weight = (torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (3072, 128256))
        options = {"dtype": hidden.dtype, "weight_dtype": weight.dtype, "capped": False, "keep": NOTHING}
        facts = device_facts(CPU)
        kernels = facts.row_kernels or ROW_KERNELS["torch"]
        plan = plan_head(3072, weight.shape, **options, kernels=kernels, workspace_bytes=WORKSPACE, facts=facts)
        assert device == "cpu" or plan.product_dtype == torch.bfloat16
        return plan.scoring


def test_tiles_of_a_gpu_know_no_cache():
    rows, columns, *_ = tiling("gpu")
    # Logits in float32, whole chunks of those that are packed.
    assert rows == 768 and columns == WORKSPACE // 4 // (768 * 4) // 2048 * 2048
    assert 2 * tiling("cpu").num_rows * tiling("cpu").num_columns <= 16 << 20


@pytest.mark.parametrize(
    "device, dtype, parts",
    [
        ("gpu", torch.bfloat16, CudaRowAttention),
        ("gpu", torch.float32, FlexAttention),
        ("cpu", torch.float32, CompiledRowAttention),
    ],
)
def test_attention_is_that_of_the_device(device, dtype, parts):
    query = torch.empty(1, 2, 512, 16, dtype=dtype)
    with simulated_device(planned_facts(device)):
        assert choose_kernels(query, query, AttentionSpec(RowMask(((512,),)), 1.0)) is parts


def test_a_simulation_leaves_no_facts_behind():
    before = device_facts(CPU)
    simulate(TrainingSetup(tiny_config("llama"), method="sft"), 64)
    assert device_facts(CPU) is before
    with pytest.raises(ValueError, match="batch_layout"):
        simulate(TrainingSetup(tiny_config("llama"), method="sft", batch_layout="shared_prefix"), 64)
    assert device_facts(CPU) is before


def exchanges(tree):
    """Yields what in a file changes something that it has imported."""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store()) if name in imported:
                yield f"{name}.{node.attr} = ..."
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store()) if name in imported:
                yield f"{name}[...] = ..."
            case ast.Call(func=ast.Name(id="setattr" | "vars"), args=[ast.Name(id=name), *_]) if name in imported:
                yield f"setattr({name}, ...)"
            case ast.Attribute(attr="patch" | "cache_clear" | "__setitem__"):
                yield f"{node.attr}(...)"


def test_no_code_is_exchanged():
    found = {path.name: [*exchanges(ast.parse(path.read_text()))] for path in PLANNING.glob("*.py")}
    assert not {name: parts for name, parts in found.items() if parts} and len(found) > 10
    patched = ast.parse("from trl_fast.ops import matmul\nmatmul.mm_into = None\nvars(matmul).update(x=1)")
    assert len([*exchanges(patched)]) == 2


def test_flash_backward_takes_float32_sums_and_ungrouped_gradients():
    query, key = torch.empty(1000, 8, 64, dtype=torch.bfloat16), torch.empty(1000, 2, 64, dtype=torch.bfloat16)
    backward = torch.ops.aten._flash_attention_backward.default
    sums, rows = 4 * query.numel(), 4 * 1000 * 8
    assert flash_workspace(backward, (query, query, query)) == sums + rows
    assert flash_workspace(backward, (query, query, key)) == sums + rows + 2 * 2 * query.numel()
    assert flash_workspace(torch.ops.aten.mm.default, (query, query, key)) == 0


def test_merging_attention_takes_no_temporaries_on_a_gpu():
    """The PyTorch that stands in for the kernel would have them."""

    def peak(kernels):
        tracker = MemoryTracker(kernels=kernels)
        with FakeTensorMode(), tracker:
            tracker.enter("all")
            out, lse = torch.empty(10, 8, 64, dtype=torch.bfloat16), torch.empty(8, 10)
            given = (out, lse, out[:6], lse[:, :6], torch.empty(10, dtype=torch.int32))
            merged, merged_lse = attention_merge.merge_attention(*given)
            assert merged.shape == out.shape and merged.dtype == out.dtype and merged_lse.shape == lse.shape
        return tracker.timeline().peak().bytes

    results = 2 * (2 * 10 * 8 * 64 + 4 * 8 * 10) + 4 * 10
    assert peak(GPU_KERNELS) == results < peak(())


def test_flex_attention_keeps_what_its_kernels_keep():
    """Capped scores: operands, output and a number a token and head; all pairs of tokens are computed."""
    trees, pairs, made = (
        ((3000, 500, 400),),
        3000 * 3001 // 2 + sum(n * 3000 + n * (n + 1) // 2 for n in (500, 400)),
        [],
    )
    meter = DeviceMeter(attended=lambda flops, *_: made.append(flops))
    tracker = MemoryTracker(kinds_by_code=KINDS_BY_CODE)
    with FakeTensorMode(), tracker, simulated_device(planned_facts("gpu", meter)):
        states = [torch.empty(1, heads, 3900, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)]
        tracker.enter("forward")
        out = tree_attention(*states, trees, softcap=50.0)
        tracker.enter("backward")
        out.sum().backward()
    forward, backward = (tracker.timeline().stage_peaks()[stage].bytes for stage in ("forward", "backward"))
    rows, of_head = 3900 * 8, 2 * 3900 * 64
    # Of queries, keys and values there are the gradients in the end, and an output's that is one number.
    assert forward == of_head * (8 + 4 + 8) + 4 * rows
    assert forward < backward < forward + of_head * (8 + 4 + 8) + 8 * rows
    assert made == [2 * 8 * pairs * 128, 7 * 8 * pairs * 128]


def test_memory_of_attention_is_known_by_the_code_that_takes_it():
    levels = simulate(TrainingSetup(tiny_config("llama"), method="sft"), 64).levels
    assert levels[KINDS.index(ATTENTION)].max() > 0


def test_a_cpu_copies_the_narrower_operand():
    upcast, narrow = torch.empty(10, 8), torch.empty(10, 8, dtype=torch.bfloat16)
    aten = torch.ops.aten
    assert mixed_dtype_workspace(aten.add_.Tensor, (upcast, narrow)) == 4 * 80
    assert mixed_dtype_workspace(aten.mul.Tensor, (narrow, upcast)) == 4 * 80
    assert mixed_dtype_workspace(aten.add_.Tensor, (upcast, upcast)) == 0
    assert mixed_dtype_workspace(aten.mul.Tensor, (narrow, 2.0)) == 0
    assert mixed_dtype_workspace(aten.copy_.default, (upcast, narrow)) == 0
