"""Gives the facts of the device whose step is planned: a GPU that is not there, or this CPU.

Fake tensors are on the CPU. Our own code asks `ops.device` for the facts of a device, so it takes the kernels, dtypes
and tiles of a GPU when those facts say so. What is neither asked there nor ours is in this table:

| what | how the plan sees it |
|---|---|
| kernels that change no more than what they are given | `RowKernels`, and fakes of our operators, that do nothing |
| launches of Triton's kernels | `roofline.launches.stand_in`, given to launchers by the facts |
| kernels whose results depend on data | tensors of the size that they had on real text |
| `addmm(..., out_dtype=, out=)`, which torch has on a GPU only | the tracker answers it: its result is `out` |
| what a flash kernel takes inside and gives back | `flash_workspace`, which the tracker adds |
| a custom op that is one kernel on a GPU | the tracker runs its fake implementation instead of its body |
| FlexAttention, which torch compiles for a GPU | `SimulatedFlexAttention`, given to attention by the facts |
| attention of padded rows, which transformers chooses | PADDED_ATTENTION, registered with transformers |
| copies to the host's memory | `SimulatedCopies`, given to offloading by the facts |
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from trl_fast.modeling.attention.cpu import CompiledRowAttention, CpuRowAttention
from trl_fast.modeling.attention.varlen import CudaRowAttention
from trl_fast.ops.backends import VECTOR_OPS, has_triton, load_extension
from trl_fast.ops.device import DeviceFacts, device_facts
from trl_fast.ops.divergence.row_kernels import DivergenceKernel
from trl_fast.ops.head.row_kernels import RowKernels
from trl_fast.ops.head.sparse_gradient import CHUNK_BYTES, SparseKernels
from trl_fast.parallel.engines import original_class

from .data_dependent_operators import SPARSE_ENTRIES
from .device_batches import pixels_on_device
from .gpu_facts import DEFAULT_CAPABILITY
from .memory_timeline import ATTENTION, IMAGES, KV_CACHE
from .roofline.known_values import know, values_of
from .roofline.launches import Launch, stand_in

aten = torch.ops.aten
# Registered with transformers for rows that need no mask: all of a batch's sequences are of one length here.
PADDED_ATTENTION = "trl_fast_planning"
# Custom ops that are one kernel on a GPU, which takes nothing but the memory of its results.
GPU_KERNELS = frozenset({"trl_fast::attention_merge", "trl_fast::gradient_scale"})
# Channels of a head that flash kernels take.
_WIDEST_FLASH = 256
_ARITHMETIC = (
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.sub_.Tensor,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.div.Tensor,
    aten.div_.Tensor,
)
_FLASH_BACKWARD = (
    aten._flash_attention_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
)


@dataclass
class DeviceMeter:
    """Measures what the facts of a planned device see: what kernels compute and touch, and copies on the host.

    host_bytes, host_peak: of copies that are there, and the most there were; launched, copied: are told of each, in
    bytes; saw_launch: is shown each launch of a Triton kernel; attended: is told of a kernel of attention, its
    operations and the bytes that it reads and writes.
    """

    launched: Callable[[int], None] = lambda _: None
    saw_launch: Callable[[Launch], None] = lambda _: None
    attended: Callable[[float, int, int], None] = lambda *_: None
    copied: Callable[[int], None] = lambda _: None
    host_bytes: int = 0
    host_peak: int = 0

    def row_kernel(self, *given: object) -> None:
        """Stands for a row kernel, which takes no memory, and reads or writes each tensor that it is given."""
        self.launched(_sizes(one for one in given if isinstance(one, torch.Tensor)))

    def changes_host(self, size: int) -> None:
        """Adds a copy of `size` bytes on the host, or takes one away."""
        self.host_bytes += size
        self.host_peak = max(self.host_peak, self.host_bytes)


def gpu_serves(op: str, backend: str) -> bool:
    """Tells whether a simulated GPU has a backend's kernels of an op that `backends.supports` finds it to have.

    Those in C++ have fakes where the extension is installed, with a CUDA part or without; launches of Triton's have
    stand-ins. Where a GPU has one of the two, its tensors are the same. Losses on one number a token are their PyTorch
    formulas, which take a few vectors more than the kernels.
    """
    if op in VECTOR_OPS:
        return False
    return backend == "cuda" and load_extension().ok or backend == "triton" and has_triton()


def planned_facts(
    device: str,
    meter: DeviceMeter | None = None,
    *,
    every_tile: bool = False,
    capability: tuple[int, int] = DEFAULT_CAPABILITY,
) -> DeviceFacts:
    """Returns the facts of the planned `device`, "gpu" or "cpu", for tensors on the CPU.

    A GPU has no cache to fit tiles of logits into, multiplies bfloat16 to float32 logits, has row kernels without
    temporaries, the head's fused kernel, those of fused layers, and torch's varlen flash kernels, two calls a layer.
    How much memory it has is not said: a plan finds what a step needs, and what is free beyond that is used, but not
    needed. every_tile: compute all tiles, not some; capability: of the GPU.
    """
    meter = meter or DeviceMeter()
    if device == "cpu":
        kernels = SparseKernels(_sparse_samples, _sparse_product)
        here = device_facts(torch.device("cpu"))
        return replace(here, own_products=False, sparse_kernels=kernels, first_tiles_only=not every_tile)
    kernel = meter.row_kernel
    return DeviceFacts(
        "cuda",
        multiplies_bf16=True,
        capability=capability,
        serves=gpu_serves,
        # Looked up at each launch: a step that is counted sets the meter after its facts are made.
        launches=stand_in(lambda launch: meter.saw_launch(launch)),
        row_kernels=RowKernels(kernel, kernel, 0, kernel, kernel, kernel),
        divergence_kernel=DivergenceKernel(kernel, 0),
        pinned_copies=functools.partial(SimulatedCopies, meter=meter),
        flex_attention=functools.partial(SimulatedFlexAttention.apply, meter),
        holds=lambda tensor: isinstance(tensor, FakeTensor),
        first_tiles_only=not every_tile,
    )


def flash_workspace(func: torch._ops.OpOverload, args: tuple) -> int:
    """Returns the bytes that CUDA's flash backward takes inside: a float32 sum of the queries' gradient, a number a
    row, and, for grouped heads, gradients of keys and values for every query head (FlashAttention-2, mha_bwd and
    mha_varlen_bwd).
    """
    if func not in _FLASH_BACKWARD:
        return 0
    query, key = args[1], args[2]
    heads, groups = query.shape[1], key.shape[1]
    expanded = 0 if heads == groups else 2 * key.numel() * key.element_size() * heads // groups
    return 4 * query.numel() + 4 * query.numel() // query.shape[-1] + expanded


def mixed_dtype_workspace(func: torch._ops.OpOverload, args: tuple) -> int:
    """Returns the bytes that a CPU takes inside of arithmetic on two dtypes: a copy of the operand that is narrower.

    A GPU converts numbers as it reads them.
    """
    if func not in _ARITHMETIC or not all(isinstance(operand, torch.Tensor) and operand.dim() for operand in args[:2]):
        return 0
    common = torch.result_type(args[0], args[1])
    return sum(operand.numel() * common.itemsize for operand in args[:2] if operand.dtype != common)


class _Copy(NamedTuple):
    """Holds a copy on the host: shape, dtype, and the values where they are known."""

    shape: torch.Size
    dtype: torch.dtype
    values: torch.Tensor | None

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class SimulatedCopies:
    """Stands for `PinnedCopies`: of fake tensors that leave the tracked memory only shapes and dtypes are kept, and
    what is known of their values.
    """

    def __init__(self, device: torch.device, meter: DeviceMeter) -> None:
        self._device, self._meter = device, meter

    def to_host(self, tensor: torch.Tensor) -> _Copy:
        """Returns what is kept of a tensor of any shape and dtype."""
        copy = _Copy(tensor.shape, tensor.dtype, values_of(tensor))
        self._meter.changes_host(copy.bytes)
        self._meter.copied(copy.bytes)
        return copy

    def to_device(self, copy: _Copy) -> torch.Tensor:
        """Returns a tensor of the shape and dtype that left."""
        self._meter.copied(copy.bytes)
        made = torch.empty(copy.shape, dtype=copy.dtype, device=self._device)
        know(made, copy.values)
        return made

    def event(self) -> None:
        """Returns nothing: every copy is done at once."""

    def wait(self, event: None) -> None:
        """Waits for nothing."""

    def abandon(self, tensor: torch.Tensor) -> None:
        """Lets go of a tensor of any shape and dtype, whose memory is free at once."""

    def forget(self, copy: _Copy) -> None:
        """Lets go of a copy."""
        self._meter.changes_host(-copy.bytes)


def _sizes(tensors: Iterable[torch.Tensor]) -> int:
    """Counts the bytes of tensors of any shape."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SimulatedFlexAttention(torch.autograd.Function):
    """Stands for FlexAttention's kernels, which keep of a row its operands, output and log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, meter: DeviceMeter, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns output (1, heads, T, Dv) and log-sum-exp (1, heads, T) of queries (1, heads, T, D).

        key, value: (1, key-value heads, T, D or Dv); pairs: of tokens that see each other.
        """
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # Two products: scores, and weights times values.
        ctx.meter, ctx.flops = meter, 2.0 * query.shape[1] * pairs * (query.shape[-1] + value.shape[-1])
        ctx.save_for_backward(query, key, value, out, lse)
        meter.attended(ctx.flops, _sizes((query, key, value)), _sizes((out, lse)))
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of query, key and value, of their shapes, from those of output and log-sum-exp."""
        query, key, value, out, lse = ctx.saved_tensors
        # The sum of the output times its gradient.
        delta = torch.empty_like(lse)
        found = [torch.empty_like(states) for states in (query, key, value)]
        given = _sizes((query, key, value, out, lse, grad))
        # Five products of the pairs, and the first two a second time: keys' gradients have a kernel of their own.
        ctx.meter.attended(3.5 * ctx.flops, given, _sizes((delta, *found)))
        return None, *found, None


def _sparse_samples(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns counts (R,), columns and log-probabilities of the entries that rows of logits (T, R, W) keep."""
    entries = logits.shape[1] * SPARSE_ENTRIES
    counts, columns = (torch.empty(size, dtype=torch.int64) for size in (logits.shape[1], entries))
    torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    return counts, columns, torch.empty(entries, dtype=torch.float32)


def _sparse_product(
    cu_entries: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns rows (M, H) of a sparse matrix's product with (K, H)."""
    torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    return torch.empty(len(cu_entries) - 1, dense.shape[1], dtype=dtype)


def padded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention of rows (B, heads, T, D) without padding, as transformers does it by default.

    It is causal but in vision towers, whose modules say so.

    On a GPU that is the flash kernel; the memory-efficient one, which takes a mask, where there is one, a window is
    shorter than the row, or heads are wider than flash kernels take; the model's own eager attention, with all scores
    in memory, where scores are capped or there are sinks.

    Returns:
        (B, T, heads, D) of the query's dtype, and weights or None, as transformers expects.
    """
    tokens, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True)
    if softcap or kwargs.get("s_aux") is not None:
        own = sys.modules[original_class(module).__module__].eager_attention_forward
        mask = query.new_empty(1, 1, tokens, keys)
        return own(module, query, key, value, mask, scaling=scaling, softcap=softcap, **kwargs)
    if not device_facts(query.device).is_cuda:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=causal)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    masked = attention_mask is not None or (sliding_window is not None and sliding_window < keys)
    if not masked and query.shape[-1] <= _WIDEST_FLASH:
        out, *_rest = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    # The kernel wants a number to add for every pair, and keys and values for every query head.
    bias = query.new_empty(query.shape[0], 1, tokens, keys).expand(-1, query.shape[1], -1, -1) if masked else None
    out, *_rest = aten._scaled_dot_product_efficient_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), bias, True, 0.0, causal and not masked, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _padded_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    device: torch.device,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_: object,
) -> torch.Tensor | None:
    """Returns the mask of rows without padding: None, or (B, 1, T, T) bool where tokens of images see each other."""
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        return None
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


AttentionMaskInterface.register(PADDED_ATTENTION, _padded_mask)
AttentionInterface.register(PADDED_ATTENTION, padded_attention)

# Whose working memory is of which kind, by the code that takes it.
KINDS_BY_CODE: dict[CodeType, str] = {
    function.__code__: ATTENTION
    for function in (
        CompiledRowAttention.forward,
        CompiledRowAttention.backward,
        CpuRowAttention.forward,
        CpuRowAttention.backward,
        CudaRowAttention.forward,
        CudaRowAttention.backward,
        SimulatedFlexAttention.forward,
        SimulatedFlexAttention.backward,
        padded_attention,
    )
} | {
    function.__code__: KV_CACHE
    for function in (DynamicLayer.update, DynamicSlidingWindowLayer.update, DynamicLayer.reorder_cache)
}
KINDS_BY_CODE[pixels_on_device.__code__] = IMAGES
