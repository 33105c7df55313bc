"""Compiles Triton kernels for AMD's GPUs, reads their assembly, and holds the fused kernel back there."""

import pytest
import torch

from benchmarks.amd_machine_code import TARGETS, amd_resources, occupancy
from benchmarks.kernel_report import KERNELS, compile_kernel
from trl_fast.ops.head import fused_kernel

# One of each kind; the kernel report compiles all.
CASES = {case.label: case for case in KERNELS}
LABELS = (
    "row_scores bf16 all outputs",
    "row_grad bf16 bias, softcap",
    "row_grad_packed to bf16",
    "attention_merge bf16, 128 channels",
    "rms_norm backward, bf16, 4096 columns, weight trained",
    "norm_rotary bf16, 128 numbers",
    "gated_activation silu bf16",
    "policy_loss clip",
)


@pytest.mark.gpu_code
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target, label):
    case = CASES[label]
    assembly = compile_kernel(case, target).asm["amdgcn"]
    assert f'.amdgcn_target "amdgcn-amd-amdhsa--{target}"' in assembly
    found = amd_resources(assembly, case.num_warps, target)
    assert found.spill_bytes == 0 and 0 < found.registers <= 128 and found.occupancy >= 0.5
    assert found.vector_loads + found.narrow_loads > 0 and found.vector_stores + found.narrow_stores > 0


def test_what_an_assembly_says_is_read():
    lines = ["    global_load_dwordx4 v[0:3], v4, s[0:1]", "    buffer_load_ushort v1, v2, s[0:3], 0 offen"]
    lines += ["    buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen", "    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1]"]
    lines += ["    .vgpr_count:     70", "    .vgpr_spill_count: 3", "    .sgpr_spill_count: 2"]
    found = amd_resources("\n".join([*lines, "    .group_segment_fixed_size: 40000"]), 4, "gfx942")
    assert (found.registers, found.spill_bytes, found.shared_bytes, found.matrix_instructions) == (70, 20, 40000, 1)
    assert (found.vector_loads, found.narrow_loads, found.vector_stores, found.narrow_stores) == (1, 1, 1, 0)
    # Registers let seven waves in on a SIMD, shared memory one program of four waves on the compute unit.
    assert found.occupancy == 4 / 32 and occupancy(70, 0, 4, "gfx942") == 28 / 32
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        amd_resources("", 4, "gfx942")


def test_the_fused_kernel_is_not_for_amd(monkeypatch):
    given = ("triton", 64, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(fused_kernel, "supports", lambda *_: type("Yes", (), {"ok": True}))
    assert fused_kernel.fused_tiles(*given) is not None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert fused_kernel.fused_tiles(*given) is None
