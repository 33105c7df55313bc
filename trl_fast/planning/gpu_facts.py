"""What a GPU does otherwise than a CPU: kernels and sizes of tiles. Fake tensors are on the CPU all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from trl_fast.modeling import activation_offloading, tiled_mlp, tree_attention
from trl_fast.ops import attention_merge, matmul, memory_pool
from trl_fast.ops.head import gradients, plan, row_blocks, sparse_kernels
from trl_fast.ops.head.row_kernels import ROW_KERNELS, RowKernels
from trl_fast.ops.head.sparse_kernels import SPARSE_KERNELS, SparseKernels

from .data_dependent_operators import SPARSE_ENTRIES
from .memory_timeline import ATTENTION
from .memory_tracker import MemoryTracker

aten = torch.ops.aten
# Registered with transformers for rows that need no mask: all of a batch's sequences are of one length here.
PADDED_ATTENTION = "trl_fast_planning"
_UNLIMITED = 1 << 62
_FLASH_BACKWARD = (
    aten._flash_attention_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
)


@contextmanager
def replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """Within, globals of a module have other values."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def choices_of(device: str, tracker: MemoryTracker) -> Iterator[None]:
    """Within, our code takes the kernels and tiles that it takes on a "gpu" or a "cpu".

    A GPU has no cache to fit tiles of logits into, multiplies bfloat16 to float32 logits, has row kernels without
    temporaries, and torch's varlen flash kernels, two calls a layer.

    Of tiles, which are alike, the first two and the last one are computed: that takes the memory of all.
    """
    with ExitStack() as stack:
        parts = _labelled(tree_attention.CpuRowAttention, tracker)
        if device == "gpu":
            parts = _gpu_parts(tracker)
            stack.enter_context(replaced(plan, tile_policy=lambda _: plan.GPU_TILES, logits_dtype=_wide_logits))
            stack.enter_context(replaced(memory_pool, _POOLED_FROM_BYTES=_UNLIMITED))
            stack.enter_context(replaced(gradients, mm_into=_product_in_place, add_mm=_product_in_place))
            stack.enter_context(replaced(row_blocks, mm_into=_product_in_place))
            stack.enter_context(replaced(matmul, _cpu_multiplies_bf16=lambda: True))
            stack.callback(ROW_KERNELS.__setitem__, "torch", ROW_KERNELS["torch"])
            ROW_KERNELS["torch"] = RowKernels(_nothing, _nothing, 0, *[_nothing] * 3)
            stack.enter_context(replaced(attention_merge, _merge_reference=_merged))
            copies = {"copies_of": SimulatedCopies, "is_on_device": _is_fake}
            stack.enter_context(replaced(activation_offloading, **copies))
            # What it keeps are fake tensors of this simulation.
            tree_attention._varlen_calls.cache_clear()
            stack.callback(tree_attention._varlen_calls.cache_clear)
        stack.enter_context(replaced(tree_attention, CpuRowAttention=parts))
        stack.enter_context(replaced(gradients, spans=_some_of(gradients.spans)))
        stack.enter_context(replaced(tiled_mlp, _tiles=_some_of(tiled_mlp._tiles)))
        for backend in ("torch", "cpp"):
            stack.callback(SPARSE_KERNELS.__setitem__, backend, SPARSE_KERNELS[backend])
            SPARSE_KERNELS[backend] = SparseKernels(_sparse_samples, _sparse_product)
        AttentionInterface.register(PADDED_ATTENTION, _padded_attention(device, tracker))
        stack.callback(AttentionInterface.register, PADDED_ATTENTION, sdpa_attention_forward)
        yield


def _some_of(spans: Callable[..., Iterator[slice]]) -> Callable[..., Iterator[slice]]:
    """The first two and the last of the tiles that a function gives."""

    def some(*given: Any) -> Iterator[slice]:
        every = list(spans(*given))
        yield from (*every[:2], *every[2:][-1:])

    return some


def _wide_logits(dtype: torch.dtype, _: torch.device) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_in_place(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product that is written where it belongs, whatever its dtype."""
    return out


def head_backend(device: str) -> str | None:
    """The backend to force: on a GPU the one whose kernels `choices_of` has replaced."""
    return "torch" if device == "gpu" else None


def flash_workspace(func: torch._ops.OpOverload, args: tuple) -> int:
    """Bytes that CUDA's flash backward takes inside: a float32 sum of the queries' gradient, a number a row, and, for
    grouped heads, gradients of keys and values for every query head (FlashAttention-2, mha_bwd and mha_varlen_bwd).
    """
    if func not in _FLASH_BACKWARD:
        return 0
    query, key = args[1], args[2]
    heads, groups = query.shape[1], key.shape[1]
    expanded = 0 if heads == groups else 2 * key.numel() * key.element_size() * heads // groups
    return 4 * query.numel() + 4 * query.numel() // query.shape[-1] + expanded


class SimulatedCopies:
    """`Copies` of fake tensors that leave the memory that is tracked: on the host only their shapes are kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def to_device(self, copy: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        return torch.empty(copy[0], dtype=copy[1], device=self._device)

    def event(self) -> None:
        """Every copy is done at once."""

    def wait(self, event: None) -> None:
        """For nothing."""

    def abandon(self, tensor: torch.Tensor) -> None:
        """Its memory is free at once."""

    def forget(self, copy: tuple[torch.Size, torch.dtype]) -> None:
        """The host's memory is not counted."""


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _sparse_samples(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts (R,), columns and log-probabilities of the entries that rows of logits (T, R, W) keep."""
    entries = logits.shape[1] * SPARSE_ENTRIES
    counts, columns = (torch.empty(size, dtype=torch.int64) for size in (logits.shape[1], entries))
    torch.empty(sparse_kernels._CHUNK_BYTES, dtype=torch.uint8)
    return counts, columns, torch.empty(entries, dtype=torch.float32)


def _sparse_product(
    starts: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows (M, H) of a sparse matrix's product with (K, H)."""
    torch.empty(sparse_kernels._CHUNK_BYTES, dtype=torch.uint8)
    return torch.empty(len(starts) - 1, dense.shape[1], dtype=dtype)


def _merged(out: torch.Tensor, lse: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of attention merged by a kernel: new tensors and no others."""
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _nothing(*_: object) -> None:
    """A row kernel that takes no memory."""


def _labelled(parts: Any, tracker: MemoryTracker) -> Any:
    """A class like `parts` whose working memory is known as attention's."""

    class Labelled(parts):
        def forward(self) -> Any:
            with tracker.labelling(ATTENTION):
                return super().forward()

        def backward(self, *given: torch.Tensor) -> Any:
            with tracker.labelling(ATTENTION):
                return super().backward(*given)

    return Labelled


def _gpu_parts(tracker: MemoryTracker) -> Any:
    flash, plain = (
        _labelled(tree_attention.CudaRowAttention, tracker),
        _labelled(tree_attention.PlainRowAttention, tracker),
    )

    def parts(query: torch.Tensor, *rest: Any) -> Any:
        return (flash if query.dtype in (torch.bfloat16, torch.float16) else plain)(query, *rest)

    return parts


def _padded_attention(device: str, tracker: MemoryTracker) -> Any:
    """Causal SDPA of rows (B, heads, T, D) without padding: on a GPU by the flash kernel."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        with tracker.labelling(ATTENTION):
            if device == "cpu":
                return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
            if torch.is_autocast_enabled("cpu"):
                query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
            out, *_rest = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)
            return out.transpose(1, 2).contiguous(), None

    return attention


def _no_mask(**_: object) -> None:
    """The mask of rows without padding."""


AttentionMaskInterface.register(PADDED_ATTENTION, _no_mask)
# Models can be built with the name outside of `choices_of`, which puts a device's function behind it.
AttentionInterface.register(PADDED_ATTENTION, sdpa_attention_forward)
