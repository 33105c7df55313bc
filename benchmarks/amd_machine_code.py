"""Reads a Triton kernel that was compiled for an AMD GPU: registers, spills, how wide it loads. Nothing is run."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Bytes of shared memory of a compute unit (AMD, CDNA 3 and CDNA 4 instruction set architecture, "LDS").
SHARED_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
TARGETS = tuple(SHARED_BYTES)
THREADS_OF_WAVE = 64
# Of a SIMD: vector registers of a lane, dealt in eights, and resident waves. A compute unit has four SIMDs.
_REGISTERS, _STEP, _WAVES, _SIMDS = 512, 8, 8, 4


@dataclass(frozen=True)
class AMDResources:
    """Holds the resources of one compiled kernel. Loads and stores count instructions on global memory in the code.

    spill_bytes: of a thread; scalar registers, which a wave has, are spilled to lanes of vector registers.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    vector_loads: int
    narrow_loads: int
    vector_stores: int
    narrow_stores: int
    matrix_instructions: int


def amd_resources(assembly: str, num_warps: int, target: str) -> AMDResources:
    """Reads the assembly of a kernel.

    Args:
        assembly: as Triton keeps it under "amdgcn", with its metadata.
        num_warps: waves of a program.
        target: one of TARGETS.
    """

    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", assembly, re.M))

    loads, stores = count(r"(?:global|buffer)_load_"), count(r"(?:global|buffer)_store_")
    vector_loads, vector_stores = (count(rf"(?:global|buffer)_{kind}_dwordx4") for kind in ("load", "store"))
    registers, shared = metadata("vgpr_count"), metadata("group_segment_fixed_size")
    return AMDResources(
        registers=registers,
        spill_bytes=4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count")),
        shared_bytes=shared,
        occupancy=occupancy(registers, shared, num_warps, target),
        vector_loads=vector_loads,
        narrow_loads=loads - vector_loads,
        vector_stores=vector_stores,
        narrow_stores=stores - vector_stores,
        matrix_instructions=count(r"v_mfma_"),
    )


def occupancy(registers: int, shared_bytes: int, num_warps: int, target: str) -> float:
    """Computes the share of a compute unit's waves that can be resident, by its registers and shared memory."""
    waves = min(_WAVES, _REGISTERS // (-(-max(registers, 1) // _STEP) * _STEP)) * _SIMDS
    programs = waves // num_warps
    if shared_bytes:
        programs = min(programs, SHARED_BYTES[target] // shared_bytes)
    return programs * num_warps / (_WAVES * _SIMDS)
