"""Reports what the GPU kernels compile to, for GPUs that need not be here.

    python -m benchmarks.kernel_report [--check]

Compiles every Triton kernel, and with nvcc every CUDA kernel, ahead of time for each target and reads the machine
code: registers, spills, shared memory, an estimate of occupancy, how wide global memory is accessed, and tensor-core
instructions. Nothing is run. With --check, a kernel that spills makes the exit status 1. Triton kernels are compiled
for AMD's gfx942 (MI300) and gfx950 (MI350) too, but for linear_scores, whose tiles are those of an H100.

The last column is the traffic with global memory as a multiple of the least possible, which is to read every logit
once and, for row_grad, to write every gradient once; row_scores of Triton may also write packed logits, and is counted
with them. It is counted in the machine code: the widths of the loads and stores that a thread executes in one trip
through its tile (MachineCode.streamed_bytes), over the bytes of the logits that the source gives it for one trip.
Values that belong to a row, such as its target or the running state, are left out: they are a few dozen bytes against
a vocabulary. A bias counts wherever it is loaded, although what one row loads serves the others from the cache: a
kernel with a bias shows more than 1 but need not move more memory.

linear_scores moves no logits, and its factors by TMA, which the widths of loads do not show: no column. The loss
kernels move vectors of one number a token: theirs compares what one trip over tokens loads and stores with what
belongs to those tokens. policy_loss shows more than 1, because it also loads two numbers of each token's sequence,
which come from the cache. attention_merge reads two outputs and writes one. Kernels of layers are compared with what
their tile needs: rows read and written once; angles and weights, which rows share, are said to be in the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from trl_fast.kernels import (
    attention_merge,
    divergence_kernels,
    gradient_scale,
    linear_scores,
    loss_kernels,
    row_kernels,
)

from .amd_machine_code import TARGETS as AMD_TARGETS
from .amd_machine_code import THREADS_OF_WAVE, AMDResources, amd_resources
from .compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from .gpu_machine_code import TARGETS, Resources, read_cubin, resources_of
from .kernel_case import KernelCase
from .layer_kernel_cases import LAYER_KERNELS

_FLOATS = dict.fromkeys(("scale", "softcap", "inv_temperature"), "fp32")
_TILE_SIZES = dict.fromkeys(("num_columns", "column_offset"), "i32")
# Bytes of logits that a thread of row_grad gets at once, and columns of a chunk that a thread has.
_THREADS = 32 * row_kernels.NUM_WARPS
_SHARE, _COLUMNS = row_kernels.BLOCK_BYTES // _THREADS, row_kernels.CHUNK // _THREADS
_STATE = {"state": "*fp64", "state_stride": "i64"}
_PACKED = {"words": "*i16", "words_stride": "i64", "tops": "*fp32", "tops_stride": "i64"}
_OF_GRAD = {"lse": "*fp32", "coefficients": "*fp32", "coefficient_stride": "i64", "out_stride": "i64"}


def _logits(dtype: str) -> dict[str, str]:
    return {"logits": f"*{dtype}", "row_stride": "i64", "targets": "*i64", "bias": f"*{dtype}"}


def _score_cases() -> Iterator[KernelCase]:
    for dtype, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        for everything in (False, True):
            flags = {"HAS_BIAS": everything, "HAS_SOFTCAP": everything, "OUTPUTS": 15 * everything}
            yield KernelCase(
                f"row_scores {dtype} {'all outputs' if everything else 'log-probs'}",
                row_kernels.row_scores_kernel,
                {**_logits(dtype), **_STATE, **_PACKED, "pack": "i32", **_TILE_SIZES, **_FLOATS},
                {**flags, "BLOCK": row_kernels.CHUNK},
                row_kernels.NUM_WARPS,
                scalar_loads=9,
                # A logit, and if it packs, which is decided when it runs, its word; a largest logit a chunk.
                least_bytes=_COLUMNS * (itemsize + 2) + 4,
            )


def _grad_cases() -> Iterator[KernelCase]:
    same = [(dtype, dtype, itemsize, 1) for dtype, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2))]
    for dtype, out, itemsize, written in (*same, ("fp32", "bf16", 4, 0.5), ("fp32", "fp16", 4, 0.5)):
        name = dtype if dtype == out else f"{dtype} to {out}"
        for everything in (False, True):
            yield KernelCase(
                f"row_grad {name} {'bias, softcap' if everything else 'plain'}",
                row_kernels.row_grad_kernel,
                {**_logits(dtype), **_OF_GRAD, "out": f"*{out}", **_TILE_SIZES, **_FLOATS},
                {"HAS_BIAS": everything, "HAS_SOFTCAP": everything, "BLOCK": row_kernels.BLOCK_BYTES // itemsize},
                row_kernels.NUM_WARPS,
                scalar_loads=6,
                least_bytes=int((1 + written) * _SHARE),
            )
    for out, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        for has_rows in (False, True):
            signature = {**_PACKED, "rows": "*i64", "targets": "*i64", **_OF_GRAD, "out": f"*{out}", **_TILE_SIZES}
            yield KernelCase(
                f"row_grad_packed to {out}{', some rows' * has_rows}",
                row_kernels.row_grad_packed_kernel,
                {**signature, "derivative": "fp32"},
                {"HAS_ROWS": has_rows, "CHUNK": row_kernels.CHUNK, "BLOCK": row_kernels.CHUNK},
                row_kernels.NUM_WARPS,
                scalar_loads=7 + has_rows,
                least_bytes=_COLUMNS * (2 + itemsize),
            )


# Outputs, and whether there are bias, softcap and scale: the log-probs alone, with their entropy, and all there is.
_LINEAR_KINDS = (
    ("log-probs", 0, (False, False, False)),
    ("log-probs, entropy", 1, (False, False, False)),
    ("everything", 15, (True, False, True)),
    ("everything, softcap", 15, (True, True, True)),
)
_KEPT = {linear_scores.NOTHING.value: "", linear_scores.WORDS.value: ", kept", linear_scores.RAW.value: ", raw kept"}
_STRIDES = {"slot_stride": "i64", "tile_stride": "i64", "state": "*fp64", "state_stride": "i64"}


def linear_case(
    capability: tuple[int, int], tiles: linear_scores.Tiles, dtype: str, kind: tuple[str, int, tuple], keep: int
) -> KernelCase:
    """Makes a case of linear_scores. kind: one of _LINEAR_KINDS; keep: what of the logits is kept, a key of _KEPT."""
    label, outputs, flags = kind
    room = {linear_scores.WORDS.value: "i16", linear_scores.RAW.value: "fp32"}.get(keep, dtype)
    blocks = {
        "hidden": (dtype, tiles.rows, tiles.depth),
        "weight": (dtype, tiles.columns, tiles.depth),
        "kept": (room, tiles.rows, tiles.columns // tiles.pieces),
    }
    matrices = {
        name: f"tensordesc<{number}[{rows},{columns}]>" if tiles.tma else f"*{number}"
        for name, (number, rows, columns) in blocks.items()
    }
    strides = ("hidden_stride", "weight_stride", "kept_stride")
    sizes = dict.fromkeys((*strides, "num_rows", "vocab_size", "hidden_size"), "i32")
    constants = dict(zip(("HAS_BIAS", "HAS_SOFTCAP", "SCALED"), flags, strict=True)) | {
        **{"OUTPUTS": outputs, "KEEP": keep, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth},
        **{"GROUP": tiles.group, "PIECES": tiles.pieces, "TMA": tiles.tma, "FLATTEN": tiles.flatten},
    }
    return KernelCase(
        f"linear_scores {dtype} {label}{_KEPT[keep]}",
        linear_scores.linear_scores_kernel,
        {**matrices, "targets": "*i64", "bias": f"*{dtype}", "parts": "*fp32", **_STRIDES, **sizes, **_FLOATS},
        constants,
        tiles.num_warps,
        scalar_loads=None,
        targets=(10 * capability[0] + capability[1],),
        num_stages=tiles.num_stages,
    )


def _linear_cases() -> Iterator[KernelCase]:
    kinds = [("bf16", kind) for kind in _LINEAR_KINDS] + [("fp16", kind) for kind in _LINEAR_KINDS[-2:]]
    for capability, tiles in linear_scores.TILES.items():
        for dtype, kind in kinds:
            capped = kind[2][1]
            if capped and not tiles.capped:
                continue
            for keep in (linear_scores.NOTHING, linear_scores.RAW if capped else linear_scores.WORDS):
                yield linear_case(capability, tiles, dtype, kind, keep.value)
    for outputs in (0, 15):
        yield KernelCase(
            f"merge_tiles {'all outputs' if outputs else 'log-probs'}",
            linear_scores.merge_tiles_kernel,
            {
                "parts": "*fp32",
                **_STRIDES,
                "tops": "*fp32",
                "tops_stride": "i64",
                "num_rows": "i32",
                "num_tiles": "i32",
            },
            {"OUTPUTS": outputs, "KEEP": True, "ROWS": linear_scores.MERGED_ROWS, "TILES": linear_scores.MERGED_TILES},
            4,
            scalar_loads=None,
        )


def _divergence_cases() -> Iterator[KernelCase]:
    heads = {}
    for head in ("student", "teacher"):
        heads |= {head: "*fp32", f"{head}_stride": "i64", f"{head}_bias": "*fp32"}
        heads |= dict.fromkeys((f"{head}_scale", f"{head}_softcap"), "fp32")
    heads |= dict.fromkeys(("inv_temperature", "p_share", "q_share"), "fp32")
    rows = {"weights": "*fp32", "results": "*fp32", "results_stride": "i64"}
    columns = divergence_kernels.BLOCK // (32 * divergence_kernels.NUM_WARPS)
    for kind in divergence_kernels.KINDS:
        for everything, out, itemsize in ((False, "bf16", 2), (True, "fp32", 4)):
            flags = dict.fromkeys(("P_BIAS", "P_SOFTCAP", "Q_BIAS", "Q_SOFTCAP"), everything)
            yield KernelCase(
                f"row_divergence {kind}, {'bias, softcap' if everything else 'plain'}, to {out}",
                divergence_kernels.row_divergence_kernel,
                {**heads, **rows, "num_columns": "i32", "gradient": f"*{out}", "gradient_stride": "i64"},
                {"KIND": kind, "HAS_GRADIENT": True, **flags, "BLOCK": divergence_kernels.BLOCK},
                divergence_kernels.NUM_WARPS,
                # It streams in loops, the last of which is the busiest: both logits read, a gradient written.
                scalar_loads=None,
                least_bytes=columns * (4 + 4 + itemsize),
                max_registers=divergence_kernels.MAX_REGISTERS,
            )


def _merge_cases() -> Iterator[KernelCase]:
    vectors = {"lse": "*fp32", "other_lse": "*fp32", "place": "*i32", "merged_lse": "*fp32"}
    strides = ["out_token", "out_head", "lse_head", "other_token", "other_head", "other_lse_head"]
    numbers = {**dict.fromkeys(strides, "i64"), "num_tokens": "i32", "num_heads": "i32"}
    for dtype, itemsize, width in (*(("bf16", 2, width) for width in (64, 96, 128, 256)), ("fp32", 4, 128)):
        block = triton.next_power_of_2(width)
        yield KernelCase(
            f"attention_merge {dtype}, {width} channels",
            attention_merge.merge_kernel,
            {**dict.fromkeys(("out", "other", "merged"), f"*{dtype}"), **vectors, **numbers},
            {"WIDTH": width, "TOKENS": attention_merge.BLOCK_ELEMENTS // block, "BLOCK": block},
            attention_merge.NUM_WARPS,
            # Place and both log-sum-exps of the tokens of which it has a part, more of them of a wider type.
            scalar_loads=9 if itemsize == 2 else 15,
            # Two outputs read, one written, and a log-sum-exp.
            least_bytes=3 * itemsize * attention_merge.BLOCK_ELEMENTS // (32 * attention_merge.NUM_WARPS) + 4,
        )


def _scale_cases() -> Iterator[KernelCase]:
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        yield KernelCase(
            f"gradient_scale {dtype}",
            gradient_scale.scale_kernel,
            {"gradient": f"*{dtype}", "factor": f"*{dtype}", "count": "i64"},
            {"BLOCK": gradient_scale.BLOCK},
            gradient_scale.NUM_WARPS,
            scalar_loads=None,
            least_bytes=2 * itemsize * gradient_scale.BLOCK // (32 * gradient_scale.NUM_WARPS),
        )


def _loss_case(
    label: str,
    kernel: JITFunction,
    vectors: str,
    others: dict[str, str],
    numbers: str,
    constants: dict[str, Any],
    num_warps: int,
    scalar_loads: int | None = None,
    bytes_of_token: int = 4,
) -> KernelCase:
    """Makes a case of a loss kernel; `vectors` and `numbers` are names of float32 pointers and floats."""
    signature = {**dict.fromkeys(vectors.split(), "*fp32"), **others, **dict.fromkeys(numbers.split(), "fp32")}
    least_bytes = bytes_of_token * constants["BLOCK"] // (32 * num_warps)
    return KernelCase(label, kernel, signature, constants, num_warps, scalar_loads, least_bytes)


def _loss_cases() -> Iterator[KernelCase]:
    # One of each kind: of the margin, of margins a token, of the two rewards.
    for loss_type in ("exo_pair", "sigmoid_norm", "nca_pair"):
        yield _loss_case(
            f"pair_loss {loss_type}",
            loss_kernels.pair_loss_kernel,
            "logprobs ref_logprobs losses sequence_logprobs gradients",
            {"cu_seqlens": "*i64", "lengths": "*i64"},
            "beta eps log_eps log_one_minus_eps tau",
            {
                "LOSS": loss_type,
                "OF_MARGIN": loss_type in loss_kernels.MARGIN_LOSSES,
                "NORMALIZED": loss_type in loss_kernels.NORMALIZED_LOSSES,
                "BLOCK": loss_kernels.PAIR_BLOCK,
            },
            loss_kernels.PAIR_WARPS,
        )
    yield _loss_case(
        "pair_loss_backward",
        loss_kernels.pair_loss_backward_kernel,
        "gradients grad_losses grad_sequence_logprobs out",
        {"cu_seqlens": "*i64", "losses_stride": "i64", "sequences_stride": "i64"},
        "",
        {"HAS_LOSSES": True, "HAS_SEQUENCES": True, "BLOCK": loss_kernels.BLOCK},
        loss_kernels.NUM_WARPS,
    )
    all_inputs = {"HAS_OLD": True, "HAS_REF": True, "BIAS_CORRECT_KL": True}
    for loss_type in ("clip", "cispo", "sapo"):
        yield _loss_case(
            f"policy_loss {loss_type}",
            loss_kernels.policy_loss_kernel,
            "logprobs old_logprobs ref_logprobs advantages weights partial_sums kl_out gradients",
            {"branch": "*i64", "clipped_out": "*i8", "num_tokens": "i32"},
            "beta lower upper delta temperature_pos temperature_neg max_log_ratio",
            {"LOSS": loss_type, **all_inputs, "BLOCK": loss_kernels.BLOCK},
            loss_kernels.NUM_WARPS,
            scalar_loads=0,
            # Branch, three log-probs, KL, whether it was clipped, gradient.
            bytes_of_token=8 + 3 * 4 + 4 + 1 + 4,
        )


LOSS_KERNELS = tuple(_loss_cases())
# What moves logits or computes them.
HEAD_KERNELS = (*_score_cases(), *_grad_cases(), *_linear_cases())
DIVERGENCE_KERNELS = tuple(_divergence_cases())
MERGE_KERNELS = tuple(_merge_cases())
SCALE_KERNELS = tuple(_scale_cases())
KERNELS = (*HEAD_KERNELS, *DIVERGENCE_KERNELS, *MERGE_KERNELS, *SCALE_KERNELS, *LAYER_KERNELS, *LOSS_KERNELS)


def compile_kernel(case: KernelCase, target: int | str) -> CompiledKernel:
    """Compiles for sm_`target` or AMD's `target` as the JIT would for aligned tensors: all divisible by 16.

    Sizes that the JIT is told not to look at (do_not_specialize) may be any number here too.
    """
    types = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    types = {name: types[name] for name in case.function.arg_names}
    plain = [parameter.do_not_specialize for parameter in case.function.params]
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith(("*", "i")) and not plain[i]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.function, types, case.constants, attributes)
    options = {"num_warps": case.num_warps, "enable_fp_fusion": case.fuses_products}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    if case.max_registers is not None and isinstance(target, int):
        options["maxnreg"] = case.max_registers
    gpu = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, THREADS_OF_WAVE)
    return triton.compile(source, target=gpu, options=options)


def resources(compiled: CompiledKernel, num_warps: int, target: int, scalar_loads: int | None = 0) -> Resources:
    """Reads a compiled Triton kernel's machine code."""
    (code,) = read_cubin(compiled.asm["cubin"], target).values()
    return resources_of(code, compiled.metadata.shared, num_warps, target, scalar_loads)


def new_table() -> Table:
    """Makes the report's table, with its columns."""
    table = Table(title="GPU kernels, compiled and not run")
    for name in ("", "kernel", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "spills B", "shared B", "occupancy", "loads 16 B + other", "stores", "tensor core"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bytes moved / least", justify="right", no_wrap=True)
    return table


def add_row(table: Table, language: str, label: str, target: int, found: Resources, least_bytes: int) -> None:
    """Adds a kernel on one target to the table."""
    table.add_row(
        language,
        label,
        f"sm_{target}",
        str(found.registers),
        str(found.spill_bytes),
        str(found.shared_bytes),
        f"{found.occupancy:.0%}",
        f"{found.vector_loads} + {found.narrow_loads}",
        f"{found.vector_stores} + {found.narrow_stores}",
        str(found.tensor_core_instructions),
        f"{found.streamed_bytes / least_bytes:.2f}" if least_bytes else "",
    )


def add_amd_row(table: Table, label: str, target: str, found: AMDResources) -> None:
    """Adds a kernel on one of AMD's targets to the table."""
    table.add_row(
        "Triton",
        label,
        target,
        str(found.registers),
        str(found.spill_bytes),
        str(found.shared_bytes),
        f"{found.occupancy:.0%}",
        f"{found.vector_loads} + {found.narrow_loads}",
        f"{found.vector_stores} + {found.narrow_stores}",
        str(found.matrix_instructions),
        "",
    )


def report_triton(table: Table) -> list[str]:
    """Adds the Triton kernels; the names of those that spill."""
    spilling = []
    for case in KERNELS:
        for target in case.targets:
            found = resources(compile_kernel(case, target), case.num_warps, target, case.scalar_loads)
            add_row(table, "Triton", case.label, target, found, case.least_bytes)
            if found.spill_bytes:
                spilling.append(f"Triton {case.label} sm_{target}")
    return spilling


def report_amd(table: Table) -> list[str]:
    """Adds the Triton kernels on AMD's GPUs; the names of those that spill."""
    spilling = []
    for case in KERNELS:
        for target in AMD_TARGETS if case.function is not linear_scores.linear_scores_kernel else ():
            found = amd_resources(compile_kernel(case, target).asm["amdgcn"], case.num_warps, target)
            add_amd_row(table, case.label, target, found)
            if found.spill_bytes:
                spilling.append(f"Triton {case.label} {target}")
    return spilling


def report_cuda(table: Table, nvcc: str) -> tuple[list[str], int]:
    """Adds the CUDA kernels that are shown; the names of all that spill, and how many were compiled."""
    compiled = [(kernel, target) for target in TARGETS for kernel in compile_cuda_kernels(nvcc, target)]
    for kernel, target in sorted(compiled, key=lambda pair: (pair[0].label, pair[1])):
        if kernel.shown:
            add_row(table, "CUDA", kernel.label, target, kernel.resources, kernel.least_bytes)
    spilling = [f"CUDA {kernel.label} sm_{target}" for kernel, target in compiled if kernel.resources.spill_bytes]
    return spilling, len(compiled)


def main() -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(description="What the GPU kernels compile to.")
    parser.add_argument("--check", action="store_true", help="fail if a kernel spills registers")
    arguments = parser.parse_args()
    table, nvcc = new_table(), find_nvcc()
    spilling = [*report_triton(table), *report_amd(table)]
    notes = "CUDA kernels: skipped, there is no nvcc"
    if nvcc:
        cuda_spilling, count = report_cuda(table, nvcc)
        spilling += cuda_spilling
        notes = f"CUDA kernels: {count} instances compiled, those without and with every flag shown"
    # A terminal wraps; a table that goes to a file is not cut.
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print(notes)
    print(f"spilling kernels: {', '.join(spilling) or 'none'}")
    return 1 if arguments.check and spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
