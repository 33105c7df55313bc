"""Lists the Triton kernels of a transformer's layers as they are compiled for the report."""

from __future__ import annotations

from collections.abc import Iterator

from trl_fast.kernels import embedding_kernels, layer_kernels, rotary_kernels

from .kernel_case import KernelCase

_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
# Widths of heads, of small and of large models, and the widest row.
_NORM_WIDTHS = (128, 896, 4096, 8192, 16384)


def _share(elements: int, num_warps: int) -> int:
    """Returns a thread's share of a program's elements."""
    return elements // (32 * num_warps)


def _strided(names: str, dtype: str, *strides: str) -> dict[str, str]:
    """Returns the types of tensors and of their strides."""
    kinds = dict.fromkeys(names.split(), f"*{dtype}")
    return kinds | {f"{name}_{stride}": "i64" for name in kinds for stride in strides}


def _norm_cases() -> Iterator[KernelCase]:
    for dtype, width in (*(("bf16", width) for width in _NORM_WIDTHS), ("fp16", 4096), ("fp32", 4096)):
        rows, block, num_warps = layer_kernels.norm_tiling(width)
        share, itemsize = _share(rows * block, num_warps), _ITEMSIZE[dtype]
        tiling = {"HAS_WEIGHT": True, "IS_GEMMA": False, "ROUNDS_FIRST": True, "ROWS": rows, "BLOCK": block}
        sizes = {"num_rows": "i32", "num_columns": "i32", "rstd": "*fp32"}
        dense = dict.fromkeys(("weight", "total", "out", "grad_x"), f"*{dtype}")
        yield KernelCase(
            f"rms_norm of a sum, {dtype}, {width} columns",
            layer_kernels.norm_kernel,
            {**_strided("x residual", dtype, "stride"), **dense, **sizes, "eps": "fp32"},
            {**tiling, "HAS_RESIDUAL": True},
            num_warps,
            scalar_loads=0,
            # Two rows read and two written, a number a row, and the weight, which is in the cache.
            least_bytes=(4 * itemsize) * share,
            cached_bytes=itemsize * share,
        )
        for has_weight in (False, True):
            has_out = width <= layer_kernels.WIDEST_OF_BOTH or not has_weight
            flags = {"HAS_SUM": has_out, "HAS_OUT": has_out, "HAS_PARTIALS": has_weight}
            yield KernelCase(
                f"rms_norm backward, {dtype}, {width} columns{', weight trained' * has_weight}",
                layer_kernels.norm_backward_kernel,
                {
                    **_strided("grad grad_sum x", dtype, "stride"),
                    **{**dense, **sizes, "partials": "*fp32", "num_programs": "i32"},
                },
                {**tiling, **flags},
                num_warps,
                scalar_loads=None,
                least_bytes=(4 if has_out else 2) * itemsize * share,
            )


def _gate_cases() -> Iterator[KernelCase]:
    for dtype, itemsize in _ITEMSIZE.items():
        block, num_warps = layer_kernels.GATE_BYTES // itemsize, layer_kernels.GATE_WARPS
        share, sizes = _share(block, num_warps), {"num_columns": "i32", "blocks": "i32"}
        for number, name in enumerate(("silu", "gelu_tanh", "gelu")):
            constants = {"ACTIVATION": number, "BLOCK": block}
            yield KernelCase(
                f"gated_activation {name} {dtype}",
                layer_kernels.gate_kernel,
                {**_strided("gate up", dtype, "stride"), "out": f"*{dtype}", **sizes},
                constants,
                num_warps,
                scalar_loads=0,
                least_bytes=3 * itemsize * share,
            )
            yield KernelCase(
                f"gated_activation backward {name} {dtype}",
                layer_kernels.gate_backward_kernel,
                {**_strided("grad gate up grad_gate grad_up", dtype, "stride"), **sizes},
                constants,
                num_warps,
                scalar_loads=0,
                least_bytes=5 * itemsize * share,
            )


# Type of heads and of angles; numbers of a head, and of those that are turned; which are pairs; one rounding.
_HEADS = (
    ("bf16", "bf16", 128, 128, 0, False),
    ("bf16", "bf16", 64, 64, 0, False),
    ("bf16", "bf16", 256, 64, 0, False),
    ("bf16", "fp32", 128, 128, 1, True),
    ("fp16", "fp16", 128, 128, 0, False),
    ("fp32", "fp32", 128, 128, 0, False),
)


def _rotary_cases() -> Iterator[KernelCase]:
    for dtype, angles, width, turned, pairs, upcast in _HEADS:
        constants = rotary_kernels.rotary_constants(width, turned, pairs, False, upcast, False)
        label = (
            f"{dtype}, {width} numbers" + f", {turned} turned" * (turned < width) + ", pairs adjacent" * (pairs > 0)
        )
        given = {**_strided("x", dtype, "batch", "head", "token"), **_strided("cos sin", angles, "batch", "token")}
        given |= dict.fromkeys(("num_rows", "num_heads", "num_tokens"), "i32")
        norm = {"weight": f"*{dtype}", "rstd": "*fp32"}
        cast = {"CAST": layer_kernels.LLAMA}
        itemsize, num_warps = _ITEMSIZE[dtype], rotary_kernels.NUM_WARPS
        # With those numbers that fill a block up.
        padded = 2 * constants["BLOCK"] + constants["REST"]
        share = _share(constants["ROWS"] * padded, num_warps)
        # Of the token: its heads have the angles from the cache, and every row the weight.
        of_token = 2 * _ITEMSIZE[angles] * _share(constants["ROWS"] * turned, num_warps)
        alike = {"num_warps": num_warps, "scalar_loads": 0, "fuses_products": False}
        yield KernelCase(
            f"rotary {label}",
            rotary_kernels.rotary_kernel,
            {**given, "out": f"*{dtype}"},
            constants,
            least_bytes=2 * itemsize * share,
            cached_bytes=of_token,
            **alike,
        )
        yield KernelCase(
            f"norm_rotary {label}",
            rotary_kernels.norm_rotary_kernel,
            {**given, **norm, "out": f"*{dtype}", "eps": "fp32"},
            {**constants, **cast},
            least_bytes=2 * itemsize * share,
            cached_bytes=of_token + itemsize * share,
            **alike,
        )
        yield KernelCase(
            f"norm_rotary backward {label}",
            rotary_kernels.norm_rotary_backward_kernel,
            {
                **given,
                **_strided("grad", dtype, "batch", "head", "token"),
                **{**norm, "grad_x": f"*{dtype}", "partials": "*fp32", "num_programs": "i32"},
            },
            {**constants, **cast, "HAS_PARTIALS": True},
            least_bytes=3 * itemsize * share,
            cached_bytes=of_token + itemsize * share,
            **{**alike, "scalar_loads": None},
        )


def _embedding_cases() -> Iterator[KernelCase]:
    rows, columns, num_warps = embedding_kernels.ROWS, embedding_kernels.BLOCK, embedding_kernels.NUM_WARPS
    for dtype in ("bf16", "fp32"):
        share = _ITEMSIZE[dtype] * _share(columns, num_warps)
        yield KernelCase(
            f"embedding_sums {dtype}",
            embedding_kernels.embedding_sums_kernel,
            {
                **dict.fromkeys(("grad", "out"), f"*{dtype}"),
                **dict.fromkeys(("order", "tokens"), "*i64"),
                **dict.fromkeys(("num_places", "num_columns"), "i32"),
            },
            {"ADDS": True, "ROWS": rows, "BLOCK": columns},
            num_warps,
            scalar_loads=None,
            # Of a token's first rows; what the row had before, and the result, come on top.
            least_bytes=rows * share,
            # Tokens and places of all rows.
            cached_bytes=2 * 8 * rows,
        )


LAYER_KERNELS = (*_norm_cases(), *_gate_cases(), *_rotary_cases(), *_embedding_cases())
