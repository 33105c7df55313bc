"""Chooses the implementation that serves a call, and tells why another does not.

Order: `cuda` (compiled) and `triton` on a GPU, `cpp` on the CPU, `torch` always. A backend that was forced, by an op's
`backend=` or by TRL_FAST_BACKEND, serves or raises with its reason: it never falls back silently. A compiled extension
that is installed and cannot be used, as beside another torch than its own, is an error, unless a backend was forced.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from trl_fast.build_record import build_again, read_build_record, read_installation, why_refused
from trl_fast.kernels.shared_constants import SHARED_CONSTANTS

from .device import DeviceFacts, device_facts

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpp", "torch")
# Ops on vectors of one number a token.
VECTOR_OPS = ("pair_loss", "policy_loss")
# Ops that have kernels for GPUs and PyTorch alone.
GPU_OPS = ("attention_merge", "gradient_scale")
HEAD_OPS = ("linear_logprob", "linear_cross_entropy", "linear_token_loss", "selective_log_softmax")
# The second is made of the head's row kernels.
DIVERGENCE_OPS = ("linear_divergence", "linear_divergence_to_given")
# Ops of a transformer's layers.
LAYER_OPS = ("rms_norm", "residual_rms_norm", "gated_activation", "rotary", "qk_norm_rotary", "embedding")
# Attention over a row of token trees: a C++ kernel and PyTorch.
ATTENTION_OPS = ("row_attention",)
# Ops that not all backends have a kernel of, and those that have one.
_ONLY_KERNELS = {
    "attention_merge": ("cuda", "triton"),
    "gradient_scale": ("triton",),
    **dict.fromkeys(ATTENTION_OPS, ("cpp",)),
    "embedding": ("triton", "cpp"),
}
OPS = (*HEAD_OPS, *DIVERGENCE_OPS, *VECTOR_OPS, *GPU_OPS, *LAYER_OPS, *ATTENTION_OPS)
ENVIRONMENT_VARIABLE = "TRL_FAST_BACKEND"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Support(NamedTuple):
    """Tells whether a backend can serve a call, and the reason, for people."""

    ok: bool
    reason: str


class BackendRow(NamedTuple):
    """Holds a line of the table that `trl-fast env` prints."""

    backend: str
    ok: bool
    reason: str


def why_not_built(part: str) -> str:
    """Returns why the build left out "extension", "cuda" or "cutlass", with the command that builds it."""
    variables = {"CUDA_HOME": f"/path/to/cuda-{torch.version.cuda}"} if part == "cuda" and torch.version.cuda else {}
    reason = read_build_record().why_missing(part)
    return f"{reason}; to build it run {build_again(read_installation(), **variables)}"


@functools.cache
def extension_is_unusable() -> str:
    """Returns why the extension that is installed cannot be used, with the command that mends it; empty if it can.

    One that was never built is no fault: then it is said once that everything runs in pure PyTorch.
    """
    if importlib.util.find_spec("trl_fast._C") is None:
        return ""
    record, again = read_build_record(), build_again(read_installation())
    if refused := why_refused(record, torch.__version__, torch.version.cuda, again):
        return refused
    try:
        from trl_fast import _C
    except ImportError as error:
        return f"the compiled extension does not load: {error}; run {again}"
    if difference := _difference_of_constants(getattr(_C, "shared_constants", dict)()):
        return f"the compiled extension was built from other sources: {difference}; run {again}"
    return ""


@functools.cache
def load_extension() -> Support:
    """Loads `trl_fast._C`, which registers the C++ ops; the reason says what is missing, and so does one log line."""
    support = _try_extension()
    if support.ok:
        _register_fakes()
        _say_what_is_refused()
    else:
        logger.warning(f"{support.reason}. Until then everything runs in pure PyTorch, which is slower.")
    return support


def _say_what_is_refused() -> None:
    """Logs which better instruction set the CPU has but this process may not use, and why."""
    from trl_fast import _C

    info = _C.build_info()
    if refused := info["refused_isa"]:
        logger.warning(f"The CPU kernels use {info['isa']}, which is slower. {refused}.")


def _register_fakes() -> None:
    """Registers the shapes of the C++ ops for FakeTensor and torch.compile, once the extension is loaded."""

    def writes_to_arguments(*args: object) -> None:
        """Returns nothing: such an op has no result of its own."""

    rows = ("scores", "weights", "scores_packed", "grad_packed", "grad", "divergence")
    layers: tuple[str, ...] = ("rms_norm", "rms_norm_backward", "gated_activation", "gated_activation_backward")
    layers += ("rotary", "norm_rotary", "norm_rotary_backward")
    for name in ("product", "add_widened", *(f"row_{name}" for name in rows), *(f"layer_{name}" for name in layers)):
        torch.library.register_fake(f"trl_fast::{name}", writes_to_arguments)

    @torch.library.register_fake("trl_fast::merge_attention")
    def _(out: torch.Tensor, lse: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return out.new_empty(out.shape), lse.new_empty(lse.shape)

    @torch.library.register_fake("trl_fast::pooled_empty")
    def _(size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)


def _difference_of_constants(compiled: Mapping[str, object]) -> str:
    """Returns the first shared constant of which the extension has another value than Python; empty if there is none.

    compiled: the extension's constants by name.
    """
    for name in {**SHARED_CONSTANTS, **compiled}:
        ours, theirs = SHARED_CONSTANTS.get(name, "missing"), compiled.get(name, "missing")
        if ours != theirs:
            return f"{name} is {theirs} in the extension and {ours} in kernels/shared_constants.py"
    return ""


def _missing_formula(op: str, backend: str, formula: str | None) -> str:
    """Returns why the loss kernels of "triton" or "cuda" cannot compute a formula of `op`; empty if they can."""
    if formula is None or op not in VECTOR_OPS:
        return ""
    if backend == "cuda":
        from trl_fast import _C

        names = _C.loss_formulas()[op]
    else:
        from trl_fast.kernels.loss_kernels import LOSS_FORMULAS

        names = LOSS_FORMULAS[op]
    return "" if formula in names else f"the {backend} kernel of {op} has no formula {formula!r}, only {sorted(names)}"


def _try_extension() -> Support:
    if importlib.util.find_spec("trl_fast._C") is None:
        return Support(False, f"the C++ extension is not built: {why_not_built('extension')}")
    if unusable := extension_is_unusable():
        return Support(False, unusable)
    from trl_fast import _C

    return Support(True, f"compiled kernels, instruction set {_C.build_info()['isa']}")


@functools.cache
def has_triton() -> bool:
    """Tells whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def supports_triton(device_kind: str) -> Support:
    """Tells whether Triton's kernels run on tensors of a kind of device."""
    if not has_triton():
        return Support(False, "triton is not installed")
    if device_kind == "cuda":
        if torch.version.hip is not None:
            return Support(True, "Triton kernels over hipBLAS blocks: compiled for AMD's GPUs, never run on one")
        return Support(True, "Triton kernels over cuBLAS blocks")
    import triton

    if triton.knobs.runtime.interpret:
        return Support(True, "Triton's interpreter, for tests only")
    return Support(False, f"Triton kernels need a CUDA device, not {device_kind}")


@functools.cache
def load_cuda_kernels() -> Support:
    """Tells whether the extension has its CUDA part; the reason says why not, and so does one log line."""
    loaded = load_extension()
    if not loaded.ok:
        return loaded
    from trl_fast import _C

    if not _C.build_info()["cuda"]:
        reason = f"the C++ extension was built without CUDA: {why_not_built('cuda')}"
        logger.warning(f"{reason}. Until then its kernels on GPUs are Triton's or PyTorch's.")
        return Support(False, reason)
    return Support(True, "compiled CUDA kernels over cuBLAS blocks")


def _supports_cuda(device_kind: str) -> Support:
    if device_kind != "cuda":
        return Support(False, f"the CUDA kernels run on a GPU, not on {device_kind}")
    return load_cuda_kernels()


def supports(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype, formula: str | None = None
) -> Support:
    """Tells whether `backend` can serve `op` for tensors of this device and dtype, and why.

    formula: for an op of losses, the name of the loss that the kernel has to know.

    Raises:
        ValueError: the op or the backend is unknown.
    """
    if op not in OPS:
        raise ValueError(f"op: unknown name {op!r}; expected one of {OPS}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: unknown name {backend!r}; expected one of {BACKENDS} or None")
    return _support(op, backend, device_facts(torch.device(device)), dtype, formula)


def _backends_with_kernel(op: str) -> Collection[str]:
    """Returns the backends that have a kernel of an op, or say themselves why they have none."""
    if op == "linear_divergence":
        from .divergence.row_kernels import DIVERGENCE_KERNELS

        return DIVERGENCE_KERNELS
    return _ONLY_KERNELS.get(op, BACKENDS)


def _support(op: str, backend: str, facts: DeviceFacts, dtype: torch.dtype, formula: str | None = None) -> Support:
    if backend == "torch":
        return Support(True, "pure PyTorch, always there")
    if backend not in (having := _backends_with_kernel(op)):
        return Support(False, f"there is no {backend} kernel of it, only in {' and '.join(having)}")
    if op in VECTOR_OPS and backend == "cpp":
        return Support(False, "there is no C++ kernel: on a CPU, one number a token costs nothing next to the head")
    if op in VECTOR_OPS and dtype != torch.float32:
        return Support(False, f"the loss kernels take float32, not {dtype}")
    if dtype not in KERNEL_DTYPES:
        return Support(False, f"kernels take float32, bfloat16 and float16, not {dtype}")
    if facts.serves is not None:
        return Support(facts.serves(op, backend), "on a simulated device")
    if backend in ("triton", "cuda"):
        support = supports_triton(facts.kind) if backend == "triton" else _supports_cuda(facts.kind)
        missing = _missing_formula(op, backend, formula) if support.ok else ""
        return Support(False, missing) if missing else support
    if facts.kind != "cpu":
        return Support(False, f"the C++ kernels run on the CPU, not on {facts.kind}")
    return load_extension()


def forced_backend() -> str | None:
    """Returns the backend that the environment forces for every op, if it does."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def choose_backend(
    op: str, requested: str | None, facts: DeviceFacts, dtype: torch.dtype, formula: str | None = None
) -> str:
    """Returns the backend that serves a call on such a device: the forced one if any, else the first that can.

    Raises:
        ValueError: the forced backend is unknown.
        RuntimeError: the forced backend cannot serve this call; the message has its reason.
        ImportError: no backend is forced, and the compiled extension that is installed cannot be used.
    """
    forced = requested or forced_backend()
    if forced is None:
        if facts.serves is None and (unusable := extension_is_unusable()):
            raise ImportError(f"{unusable}; {ENVIRONMENT_VARIABLE}=torch runs in pure PyTorch, which is slower")
        return next(name for name in BACKENDS if _support(op, name, facts, dtype, formula).ok)
    if forced not in BACKENDS:
        raise ValueError(f"backend: unknown name {forced!r}; expected one of {BACKENDS} or None")
    support = _support(op, forced, facts, dtype, formula)
    if not support.ok:
        origin = "backend=" if requested else f"{ENVIRONMENT_VARIABLE}="
        raise RuntimeError(f"{origin}{forced!r} was forced for {op}, but it cannot serve: {support.reason}")
    return forced


def backend_table(device: torch.device | str = "cpu") -> list[BackendRow]:
    """Returns every backend with its reason, for float32 tensors on `device`."""
    return [BackendRow(name, *supports("linear_logprob", name, device, torch.float32)) for name in BACKENDS]
