"""Repairs Triton's interpreter (3.6 to 3.8), to run our kernels on CPU tensors.

The stock interpreter (numpy underneath) is silently wrong in ways that would let a broken kernel pass:

- bfloat16 values are raw 16-bit integers to it, and are multiplied, compared and cast as such;
- a masked load without `other` gives 0, where a GPU gives anything: here NaN (or the largest integer);
- an out-of-bounds access reads or writes the process's memory: here it raises, naming the kernel's argument;
- programs run in order, which hides that one depends on another: here they run shuffled;
- Triton 3.6 turns arrays of one element into loop bounds as NumPy 2.4 no longer allows.

`interpreted_kernels()` is the only thing to use. It needs no TRITON_INTERPRET before import, and restores everything,
so that kernels can still be compiled in the same process.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 values, rounded to nearest even; NaN becomes the quiet NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> np.ndarray:
    return bf16_to_float(handle.data) if _is_bf16(handle) else handle.data


class Memory:
    """The tensors of the running kernel, for naming an access outside them."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, str]] = []

    def remember(self, names: list[str], arguments: Any) -> None:
        """Takes down where each tensor argument's storage lies."""
        self.spans = []
        for name, argument in zip(names, arguments, strict=False):
            tensor = getattr(argument, "base", argument)  # a descriptor is of a tensor
            if hasattr(tensor, "untyped_storage"):
                storage = tensor.untyped_storage()
                self.spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), name))

    def check(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, what: str) -> None:
        """Raises IndexError if an unmasked pointer leaves every tensor."""
        used = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        inside = np.zeros(used.shape, bool)
        for start, stop, _ in self.spans:
            inside |= (used >= start) & (used + np.uint64(itemsize) <= stop)
        if inside.all():
            return
        bad = int(used[~inside][0])
        start, stop, name = min(self.spans, key=lambda span: min(abs(bad - span[0]), abs(bad - span[1])))
        raise IndexError(
            f"{what} out of bounds in {int((~inside).sum())} lanes: byte {bad - start} of {name!r}, "
            f"which has {stop - start}; program {interpreter.interpreter_builder.grid_idx}"
        )


class _Patches(contextlib.ExitStack):
    """Attributes set for the time of a `with`."""

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Sets owner.name and returns what was there; it comes back at the end."""
        before = getattr(owner, name)
        self.callback(setattr, owner, name, before)
        setattr(owner, name, value)
        return before


def _repair_bf16(patches: _Patches) -> None:
    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) or _is_bf16(right)):
            return stock_binary(self, left, right, op)
        result = op(_values(left), _values(right))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(float_to_bf16(result), left.dtype.scalar)

    def unary_op(self: Any, argument: Any, op: Any) -> Any:
        if not _is_bf16(argument):
            return stock_unary(self, argument, op)
        return Handle(float_to_bf16(op(_values(argument))), argument.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        to = target.scalar
        if to == tl.bfloat16 and not _is_bf16(source):
            return Handle(float_to_bf16(source.data.astype(np.float32)), to)
        if _is_bf16(source) and to != tl.bfloat16:
            return Handle(_values(source).astype(interpreter._get_np_dtype(target)), to)
        return stock_cast(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return Handle(float_to_bf16(source.data), target.scalar)
        return stock_fp_to_fp(self, source, target, rounding)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = (_values(x).astype(np.float32) for x in (a, b))
        # In float64, where sums of 16-bit numbers' products are exact: in float32 a row's bits depend on its place in
        # the tile, on some CPUs, as on no GPU.
        product = np.matmul(left.astype(np.float64), right.astype(np.float64))
        return Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    stock_binary = patches.set(Builder, "binary_op", binary_op)
    stock_unary = patches.set(Builder, "unary_op", unary_op)
    stock_cast = patches.set(Builder, "cast_impl", cast_impl)
    stock_fp_to_fp = patches.set(Builder, "create_fp_to_fp", fp_to_fp)
    patches.set(Builder, "create_dot", dot)


def _poison(handle: Any, mask: np.ndarray) -> Any:
    data = handle.data.copy()
    unread = ~np.broadcast_to(mask, data.shape).astype(bool)
    if _is_bf16(handle):
        data[unread] = np.uint16(0x7FC0)
    elif data.dtype.kind == "f":
        data[unread] = np.nan
    elif data.dtype.kind in "iu":
        data[unread] = np.iinfo(data.dtype).max
    return Handle(data, handle.dtype)


def _check_memory(patches: _Patches) -> None:
    memory = Memory()

    def init_args(self: Any, arguments: Any, keywords: Any) -> Any:
        prepared = stock_init(self, arguments, keywords)
        memory.remember([*self.arg_names], [*prepared[0]])
        return prepared

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        memory.check(pointers.data, mask.data, itemsize, "load")
        loaded = stock_load(self, pointers, mask, other, *rest, **named)
        return _poison(loaded, mask.data) if other is None else loaded

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.check(pointers.data, mask.data, value.data.dtype.itemsize, "store")
        return stock_store(self, pointers, value, mask, *rest)

    stock_init = patches.set(interpreter.GridExecutor, "_init_args_hst", init_args)
    stock_load = patches.set(Builder, "create_masked_load", masked_load)
    stock_store = patches.set(Builder, "create_masked_store", masked_store)


def _shuffle_programs(patches: _Patches, seed: int) -> None:
    generator = random.Random(seed)
    order: list[int] = []

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        dims = self.grid_dim
        count = dims[0] * dims[1] * dims[2]
        if (x, y, z) == (0, 0, 0):
            order[:] = generator.sample(range(count), count)
        program = order.pop()
        stock(self, program // (dims[1] * dims[2]), program // dims[2] % dims[1], program % dims[2])

    stock = patches.set(Builder, "set_grid_idx", set_grid_idx)


def _interpret_helpers(patches: _Patches) -> None:
    """Lets a JIT function that an interpreted kernel calls (ours, tl.sum, ...) run interpreted too.

    The stock one patches triton.language when it is called and never restores it, which breaks later compilation.
    """
    cache: dict[Any, Any] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in cache:
            cache[self.fn] = interpreter.InterpretedFunction(self.fn)
        scope = interpreter._patch_lang(self.fn)
        try:
            return cache[self.fn].rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    patches.set(JITFunction, "__call__", call)


def _repair_index(patches: _Patches) -> None:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    stock = patches.set(interpreter, "_patch_lang_tensor", patch_lang_tensor)


@contextlib.contextmanager
def interpreter_repaired(*, poison_and_bounds: bool = True, shuffle: int | None = 0) -> Iterator[None]:
    """The repaired interpreter, with triton.knobs.runtime.interpret on; kernels made by `interpreted` run in it."""
    with _Patches() as patches, triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        _repair_bf16(patches)
        _interpret_helpers(patches)
        _repair_index(patches)
        if poison_and_bounds:
            _check_memory(patches)
        if shuffle is not None:
            _shuffle_programs(patches, shuffle)
        yield


def interpreted(kernel: JITFunction) -> interpreter.InterpretedFunction:
    """The interpreted twin of a kernel, launched as `twin[grid](...)`."""
    return interpreter.InterpretedFunction(kernel.fn)


@contextlib.contextmanager
def interpreted_kernels(**options: Any) -> Iterator[None]:
    """Runs the launchers of all kernels but those of losses interpreted, on CPU tensors."""
    from trl_fast.kernels import (
        attention_merge,
        divergence_kernels,
        embedding_kernels,
        gradient_scale,
        layer_kernels,
        linear_scores,
        rotary_kernels,
        row_kernels,
    )

    kernels = [(row_kernels, name) for name in ("row_scores_kernel", "row_grad_kernel", "row_grad_packed_kernel")]
    kernels += [(linear_scores, name) for name in ("linear_scores_kernel", "merge_tiles_kernel")]
    kernels += [(attention_merge, "merge_kernel"), (divergence_kernels, "row_divergence_kernel")]
    kernels += [(embedding_kernels, "embedding_sums_kernel")]
    layers = ("norm_kernel", "norm_backward_kernel", "gate_kernel", "gate_backward_kernel")
    kernels += [(layer_kernels, name) for name in layers]
    heads = ("rotary_kernel", "norm_rotary_kernel", "norm_rotary_backward_kernel")
    kernels += [(rotary_kernels, name) for name in heads]
    kernels.append((gradient_scale, "scale_kernel"))
    with interpreter_repaired(**options), _Patches() as patches:
        for module, name in kernels:
            patches.set(module, name, interpreted(getattr(module, name)))
        yield
