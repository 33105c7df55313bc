"""Compiles the CUDA kernels with nvcc for GPUs that need not be here."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build_backend import cutlass_flags, find_cutlass

from .gpu_machine_code import MachineCode, Resources, read_cubin, resources_of

SOURCES = Path(__file__).parents[1] / "csrc"
# Made with CUTLASS, for one target; its blocks are three warpgroups.
CUTLASS_SOURCE, CUTLASS_TARGET, CUTLASS_WARPS = "fused_scores_sm90", 90, 12
# What its speed rests on: products, loads by TMA, and registers that move from the loading warps to the others.
CUTLASS_DETAILS = ("HGMMA", "UTMALDG", "USETMAXREG")
# Every other kernel has blocks of 256 threads. A thread of row_scores has so many columns of a chunk; one of row_grad
# takes so many packs of sixteen bytes, or shares of packed chunks, at once.
NUM_WARPS, SHARE, BATCH = 8, 8, 2
# Loads of values that belong to a row of row_grad, its packed form's index and largest logits of chunks among them.
# row_scores has a loop, where there are none.
GRAD_SCALAR_LOADS, PACKED_GRAD_SCALAR_LOADS = 6, 7 + BATCH

_NAME = re.compile(r"([a-z]+(?:_[a-z]+)*)_kernel[EI]")
# Types of the logits and, for row_grad, of the gradient (a repeated class is written S…_), flags, outputs.
_TYPE = "f|13__nv_bfloat16|6__half"
_ROW_FLAGS = re.compile(rf"row_\w+_kernelI({_TYPE})({_TYPE}|S\w*_)?Lb([01])ELb([01])E(?:Li(\d+)E)?")
_DTYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
_OUTPUTS = {"0": "log-probs", "1": "entropy", "15": "all outputs"}
# For a loss kernel, the access that it makes once a token, and the least bytes of a token: its log-prob, read; its
# gradient, written; or branch, three log-probs, KL, clipping and gradient. Its sequence's advantage and weight come
# from the cache. How often the compiler has unrolled the loop over tokens is told by how often that access is in it.
_TOKENS = {
    "pair_loss": (r"LDG\.E$", 4),
    "pair_loss_backward": (r"STG\.E$", 4),
    "policy_loss": (r"STG\.E\.U8", 8 + 3 * 4 + 4 + 1 + 4),
}
_PACKED_SCORES = re.compile(r"row_scores_packed_kernelILb([01])ELi(\d+)E")
# The number of a kind in csrc/cuda/divergence_kernels.cuh, and whether neither head has a bias or a softcap.
_DIVERGENCE = re.compile(r"row_divergence_kernelILN\w+?DivergenceE(\d)ELb([01])E")
_DIVERGENCES = ("forward KL", "reverse KL", "jsd", "skewed forward KL", "skewed reverse KL", "tvd")
# Of a layer's kernel the type, of a norm's the threads that share a row and the packs that each of them has, and
# whether rows lie in packs.
_LAYER = re.compile(rf"(?:rms_norm|gate|rotary)\w*?_kernelI({_TYPE})(?:Li(\d+)ELi(\d+)E)?Lb([01])E")
_LAYERS = ("rms_norm", "gate", "rotary", "norm_rotary")
# Of merged attention the type, and whether rows lie in packs. Place and both log-sum-exps of its two tokens.
_MERGE = re.compile(rf"attention_merge_kernelI({_TYPE})Lb([01])E")
MERGE_SCALAR_LOADS = 6
_PACKED_GRAD = re.compile(rf"row_grad_packed_kernelI({_TYPE})E")
# Without any flag (bias, softcap, outputs), and with all of them.
_ENDS = {("0", "0", None), ("1", "1", None), ("0", "0", "0"), ("1", "1", "15")}


@dataclass(frozen=True)
class CudaKernel:
    """Holds one kernel, or one instance of a kernel template, compiled for one target."""

    label: str
    # False for the instances between the one without any flag and the one with all of them.
    shown: bool
    # As in KernelCase.
    least_bytes: int
    resources: Resources


def find_nvcc() -> str | None:
    """Returns nvcc's path, if there is a toolkit."""
    return shutil.which("nvcc")


def _label(mangled: str, name: str) -> tuple[str, bool]:
    """Returns a kernel's name for people, and whether it is shown."""
    if name == "fused_scores":
        return f"{name} {'bf16' if 'bfloat16_t' in mangled else 'fp16'}", True
    if divergence := re.search(_DIVERGENCE, mangled):
        kind, plain = divergence.groups()
        return f"{name} {_DIVERGENCES[int(kind)]}, {'plain' if plain == '1' else 'bias, softcap'}", True
    if layer := re.search(_LAYER, mangled):
        dtype, threads, packs, whole = layer.groups()
        shared = f", {threads} threads of {packs} packs" if threads else ""
        return f"{name} {_DTYPES[dtype]}{shared}{', number by number' * (whole == '0')}", whole == "1"
    if merge := re.search(_MERGE, mangled):
        dtype, whole = merge.groups()
        return f"{name} {_DTYPES[dtype]}{', number by number' * (whole == '0')}", whole == "1"
    if packed := re.search(_PACKED_GRAD, mangled):
        return f"{name} to {_DTYPES[packed.group(1)]}", True
    if packed := re.search(_PACKED_SCORES, mangled):
        bias, outputs = packed.groups()
        return f"{name} {_OUTPUTS[outputs]}{', bias' * (bias == '1')}", (bias, bias, outputs) in _ENDS
    flags = re.search(_ROW_FLAGS, mangled)
    if flags is None:
        return name, True
    dtype, grad_dtype, bias, softcap, outputs = flags.groups()
    narrowed = f" to {_DTYPES[grad_dtype]}" if dtype == "f" and grad_dtype not in ("f", None) else ""
    words = [_OUTPUTS[outputs]] if outputs else []
    words += [word for word, on in (("bias", bias), ("softcap", softcap)) if on == "1"]
    shown = (bias, softcap, outputs) in _ENDS
    return f"{name} {_DTYPES[dtype]}{narrowed} {', '.join(words) or 'plain'}", shown


def _least_bytes(label: str, code: MachineCode) -> int:
    """Returns the least bytes that a thread moves: logits read and gradients written; for tokens, as in _TOKENS.

    Of merged attention, two outputs read and one written, with its log-sum-exp, of two tokens. 0 for row_divergence: a
    loop of it writes gradients of three dtypes, of which one is asked for. And for what moves no logits of its own, or
    these as one of several things, and for layers, whose code has several ways.
    """
    if label.startswith(("row_divergence", "fused_scores", "merge_parts", *_LAYERS)):
        return 0
    if label.startswith("attention_merge"):
        return 2 * (3 * 16 + 4)
    if label in _TOKENS:
        once, each = _TOKENS[label]
        return each * sum(re.match(once, opcode) is not None for opcode in code.busiest_loop())
    if label.startswith("row_scores_packed"):
        return SHARE * (4 + 2) + 4
    if label.startswith("row_scores"):
        return SHARE * (4 if " fp32" in label else 2)
    if label.startswith("row_grad_packed"):
        return BATCH * SHARE * (2 + (4 if "fp32" in label else 2))
    return BATCH * (16 + (8 if " to " in label else 16))


def _targets(source: Path, target: int) -> list[str] | None:
    """Returns nvcc's flags for a source and a target; None if it is for another one, or CUTLASS is not here."""
    if source.stem != CUTLASS_SOURCE:
        return [f"-arch=sm_{target}"]
    cutlass = find_cutlass() if target == CUTLASS_TARGET else None
    arch = f"-gencode=arch=compute_{target}a,code=sm_{target}a"
    return [arch, "-std=c++20", *cutlass_flags(cutlass)] if cutlass else None


def compile_cuda_kernels(nvcc: str, target: int, sources: str = "*.cu") -> Iterator[CudaKernel]:
    """Compiles every kernel of csrc/cuda for sm_`target`; sources: pattern of the names of its files.

    Raises:
        subprocess.CalledProcessError: nvcc failed; its messages are on the terminal.
    """
    for source in sorted((SOURCES / "cuda").glob(sources)):
        flags = _targets(source, target)
        if flags is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernels.cubin")
            command = [nvcc, "-O3", f"-I{SOURCES}", "-cubin", *flags, str(source), "-o", str(path)]
            subprocess.run(command, check=True)
            code = read_cubin(path.read_bytes(), target)
        for mangled, function in sorted(code.items()):
            yield _cuda_kernel(mangled, function, target)


def _cuda_kernel(mangled: str, function: MachineCode, target: int) -> CudaKernel:
    """Returns what is said of a compiled kernel."""
    name = re.search(_NAME, mangled)[1]
    label, shown = _label(mangled, name)
    packed_grad = label.startswith("row_grad_packed")
    scalar_loads = PACKED_GRAD_SCALAR_LOADS if packed_grad else GRAD_SCALAR_LOADS
    scalar_loads = MERGE_SCALAR_LOADS if name == "attention_merge" else scalar_loads
    scalar_loads = None if label in _TOKENS or name in ("fused_scores", "merge_parts") else scalar_loads
    num_warps = CUTLASS_WARPS if name == "fused_scores" else NUM_WARPS
    found = resources_of(function, function.shared_bytes, num_warps, target, scalar_loads)
    if name == "fused_scores":
        found.details.update({opcode: function.count(opcode) for opcode in CUTLASS_DETAILS})
    return CudaKernel(label, shown, _least_bytes(label, function), found)
