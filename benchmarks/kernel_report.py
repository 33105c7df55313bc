"""What the GPU kernels compile to, for GPUs that need not be here.

    python -m benchmarks.kernel_report

Compiles every Triton kernel ahead of time for each target and reads the machine code: registers, spills, shared
memory, an estimate of occupancy, how wide global memory is accessed, and tensor-core instructions. Nothing is run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from trl_fast.kernels import rows

TARGETS = (80, 90, 100)
# Per multiprocessor: registers, warps, blocks, and bytes of shared memory (NVIDIA, CUDA C++ Programming Guide, table
# of technical specifications per compute capability).
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class KernelCase:
    """A kernel with the types of its arguments (Triton's spelling) and its compile-time constants."""

    label: str
    function: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    # Loads of single values, such as a row's target, which cannot be wide.
    scalar_loads: int


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. Loads and stores are counts of global-memory instructions in the code."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    tensor_core_instructions: int
    details: dict[str, int] = field(default_factory=dict, compare=False)


def _row_cases() -> Iterator[KernelCase]:
    floats = dict.fromkeys(("scale", "softcap", "inv_temperature"), "fp32")
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        block = {"BLOCK": rows.BLOCK_BYTES // itemsize}
        logits = {"logits": f"*{dtype}", "row_stride": "i64", "targets": "*i64", "bias": f"*{dtype}"}
        for everything in (False, True):
            flags = ("HAS_BIAS", "HAS_SOFTCAP", "WITH_ENTROPY", "WITH_SQUARES", "WITH_MEAN", "WITH_TOP1")
            sizes = {"state": "*fp64", "state_stride": "i64", "num_columns": "i32", "column_offset": "i32"}
            yield KernelCase(
                f"row_scores {dtype} {'all outputs' if everything else 'log-probs'}",
                rows.row_scores_kernel,
                {**logits, **sizes, **floats},
                {**dict.fromkeys(flags, everything), **block},
                rows.NUM_WARPS,
                scalar_loads=9,
            )
            sizes = {"lse": "*fp32", "coefficients": "*fp32", "coefficient_stride": "i64", "out": f"*{dtype}"}
            sizes |= {"out_stride": "i64", "num_columns": "i32", "column_offset": "i32"}
            yield KernelCase(
                f"row_grad {dtype} {'bias, softcap' if everything else 'plain'}",
                rows.row_grad_kernel,
                {**logits, **sizes, **floats},
                {"HAS_BIAS": everything, "HAS_SOFTCAP": everything, **block},
                rows.NUM_WARPS,
                scalar_loads=6,
            )


KERNELS = tuple(_row_cases())


def compile_kernel(case: KernelCase, target: int) -> CompiledKernel:
    """Compiles for sm_`target` as the JIT would for aligned tensors: pointers and sizes divisible by 16."""
    types = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    types = {name: types[name] for name in case.function.arg_names}
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith(("*", "i"))]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.function, types, case.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": case.num_warps})


def occupancy(registers: int, shared_bytes: int, num_warps: int, target: int) -> float:
    """Share of a multiprocessor's warps that can be resident, by its registers and shared memory."""
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // registers_of_warp // 4 * 4 // num_warps
    by_shared = SHARED_BYTES[target] // (shared_bytes + SHARED_RESERVED)
    return min(by_registers, by_shared, WARPS // num_warps, BLOCKS) * num_warps / WARPS


def _run(tool: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def opcodes(cubin: bytes) -> list[str]:
    """The machine instructions of a cubin, with their modifiers, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = _run("nvdisasm", "-c", str(path))
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)


def resources(compiled: CompiledKernel, num_warps: int, target: int) -> Resources:
    """Reads a compiled kernel's machine code."""
    cubin = compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    code = opcodes(cubin)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in code)

    loads, stores = count(r"LDG\b|LDG\."), count(r"STG\b|STG\.")
    wide_loads, wide_stores = count(r"LDG\..*128"), count(r"STG\..*128")
    shared = compiled.metadata.shared
    return Resources(
        registers=registers,
        spill_bytes=4 * count(r"LDL|STL"),
        shared_bytes=shared,
        occupancy=occupancy(registers, shared, num_warps, target),
        wide_loads=wide_loads,
        narrow_loads=loads - wide_loads,
        wide_stores=wide_stores,
        narrow_stores=stores - wide_stores,
        tensor_core_instructions=count(r"[HQI]G?MMA|UTC\w*MMA"),
        details={"instructions": len(code)},
    )


def main() -> None:
    """Prints the table."""
    console = Console()
    table = Table(title="GPU kernels, compiled and not run")
    for name in ("kernel", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "spills B", "shared B", "occupancy", "loads 16 B + other", "stores", "tensor core"):
        table.add_column(name, justify="right")
    for case in KERNELS:
        for target in TARGETS:
            found = resources(compile_kernel(case, target), case.num_warps, target)
            table.add_row(
                case.label,
                f"sm_{target}",
                str(found.registers),
                str(found.spill_bytes),
                str(found.shared_bytes),
                f"{found.occupancy:.0%}",
                f"{found.wide_loads} + {found.narrow_loads}",
                f"{found.wide_stores} + {found.narrow_stores}",
                str(found.tensor_core_instructions),
            )
    console.print(table)


if __name__ == "__main__":
    main()
