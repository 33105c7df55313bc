"""Reads a compiled GPU kernel: registers, spills, and how its machine code touches global memory. Nothing is run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

TARGETS = (80, 90, 100)
# Per multiprocessor: registers, warps, blocks, and bytes of shared memory (NVIDIA, CUDA C++ Programming Guide, table
# of technical specifications per compute capability).
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED_BYTES = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
SHARED_RESERVED = 1024

_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Resources:
    """Holds the resources of one compiled kernel. Loads and stores count global-memory instructions in the code."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    vector_loads: int
    narrow_loads: int
    vector_stores: int
    narrow_stores: int
    tensor_core_instructions: int
    # Bytes that a thread moves in one trip through its tile (MachineCode.streamed_bytes) or its busiest loop.
    streamed_bytes: int
    details: dict[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class MachineCode:
    """Holds one function of a cubin: its instructions in order, and its loops as (first, last) instruction."""

    registers: int
    shared_bytes: int
    opcodes: list[str]
    loops: list[tuple[int, int]]

    def count(self, pattern: str) -> int:
        """Counts the instructions that match."""
        return sum(re.match(pattern, opcode) is not None for opcode in self.opcodes)

    def busiest_loop(self) -> list[str]:
        """Returns the opcodes of the innermost loop that moves most: where a kernel streams vectors of any alignment.

        Code that was put behind the kernel's end and jumps back looks like a loop too, an outer or an idle one.
        """
        inner = [
            (a, b) for a, b in self.loops if not any((a, b) != (c, d) and a <= c <= d <= b for c, d in self.loops)
        ]
        return max((self.opcodes[a : b + 1] for a, b in inner), key=moved_bytes, default=[])

    def streamed_bytes(self, scalar_loads: int) -> int:
        """Counts the bytes of global memory that a thread moves in one trip through the code that streams the row.

        That is the loop that has the sixteen-byte loads. Code without one takes its tile in one go: then it is all
        instructions outside of loops (those are for edges), less `scalar_loads` of values that belong to a row.
        """
        streams = [self.opcodes[a : b + 1] for a, b in self.loops]
        streams = [stream for stream in streams if any(_is_access(o) and _width(o) == 16 for o in stream)]
        if streams:
            return moved_bytes(min(streams, key=len))
        looped = {i for first, last in self.loops for i in range(first, last + 1)}
        accesses = [o for i, o in enumerate(self.opcodes) if i not in looped and _is_access(o)]
        narrow_loads = sorted(_width(o) for o in accesses if o.startswith("LDG") and _width(o) < 16)
        rest = sum(_width(o) for o in accesses if o.startswith("STG") or _width(o) == 16)
        return rest + sum(narrow_loads[: max(len(narrow_loads) - scalar_loads, 0)])


def _is_access(opcode: str) -> bool:
    return re.match(r"(LDG|LDGSTS|STG)\b", opcode) is not None


def _width(opcode: str) -> int:
    """Returns the bytes that a global load or store moves."""
    return next((width for name, width in _WIDTHS.items() if name in opcode.split(".")), 4)


def moved_bytes(opcodes: list[str]) -> int:
    """Counts the bytes of global memory that a thread loads and stores in these instructions."""
    return sum(_width(opcode) for opcode in opcodes if _is_access(opcode))


def occupancy(registers: int, shared_bytes: int, num_warps: int, target: int) -> float:
    """Computes the share of a multiprocessor's warps that can be resident, by its registers and shared memory."""
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // registers_of_warp // 4 * 4 // num_warps
    by_shared = SHARED_BYTES[target] // (shared_bytes + SHARED_RESERVED)
    return min(by_registers, by_shared, WARPS // num_warps, BLOCKS) * num_warps / WARPS


def _run(tool: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Parses the opcodes and loops of a function's disassembly: a loop is a branch back to a label."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(opcodes)
        if instruction := _INSTRUCTION.search(line):
            opcode, operands = instruction.groups()
            opcodes.append(opcode)
            destination = re.search(r"`\((\.L\w+)\)", operands)
            if opcode.startswith("BRA") and destination and destination.group(1) in labels:
                loops.append((labels[destination.group(1)], len(opcodes) - 1))
    # A kernel ends in a branch to itself, which is no loop.
    return opcodes, [loop for loop in loops if loop[0] < loop[1]]


def read_cubin(cubin: bytes, target: int) -> dict[str, MachineCode]:
    """Returns every kernel of a cubin by its (mangled) name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        sections = re.split(r"(?m)^\s*\.section\s+\.text\.", _run("nvdisasm", "-c", str(path)))[1:]
    needs = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", usage)}
    code = {}
    for section in sections:
        name = section[: section.index(",")].strip('"')
        registers, shared = needs[name]
        # From sm_90 on, the system's own share is listed with the kernel's.
        own_shared = shared - SHARED_RESERVED if target >= 90 and shared >= SHARED_RESERVED else shared
        code[name] = MachineCode(registers, own_shared, *_parse(section))
    return code


def resources_of(
    code: MachineCode, shared_bytes: int, num_warps: int, target: int, scalar_loads: int | None
) -> Resources:
    """Returns a kernel's resources on sm_`target`. scalar_loads: None if it streams in its busiest loop."""
    # LDGSTS loads straight into shared memory.
    loads, stores = code.count(r"LDG(STS)?\b"), code.count(r"STG\b")
    vector_loads, vector_stores = code.count(r"LDG(STS)?\..*\b128\b"), code.count(r"STG\..*\b128\b")
    return Resources(
        registers=code.registers,
        spill_bytes=4 * code.count(r"LDL|STL"),
        shared_bytes=shared_bytes,
        occupancy=occupancy(code.registers, shared_bytes, num_warps, target),
        vector_loads=vector_loads,
        narrow_loads=loads - vector_loads,
        vector_stores=vector_stores,
        narrow_stores=stores - vector_stores,
        tensor_core_instructions=code.count(r"[HQI]G?MMA|UTC\w*MMA"),
        streamed_bytes=moved_bytes(code.busiest_loop()) if scalar_loads is None else code.streamed_bytes(scalar_loads),
        details={"instructions": len(code.opcodes)},
    )
