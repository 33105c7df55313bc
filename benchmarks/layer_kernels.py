"""Times the C++ kernels of layers on one CPU thread, as shares of the bandwidth that a copy of as many bytes reaches.

    python -m benchmarks.layer_kernels [--rows 8192 --width 1024 --inner 1024 --rounds 15]

Bytes are counted: each input is read once, each result written once. Kernel and copy run in turns, and the shortest
CPU time of each counts, so that other processes disturb least. Writes benchmarks/results/layer_kernels.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from trl_fast.ops.backends import load_extension
from trl_fast.ops.layers import ACTIVATIONS, NORM_CASTS, PAIRS

from .machine_info import describe_machine

RESULT = Path(__file__).parent / "results" / "layer_kernels.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_WIDTH = 64


class Case(NamedTuple):
    """Holds a kernel to time: its name, direction, the bytes that it has to move, and a call."""

    op: str
    direction: str
    num_bytes: int
    run: Callable[[], object]


def size(*tensors: torch.Tensor | None) -> int:
    """Returns the bytes of tensors of any shape and dtype."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def norm_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the norms of (rows, width), alone and with the residual."""
    kernels = torch.ops.trl_fast
    x, residual, out, total = (torch.randn(rows, width).to(dtype) for _ in range(4))
    weight, rstd, partials = torch.ones(width, dtype=dtype), torch.ones(rows), torch.ones(-(-rows // 64), width)
    for cast in NORM_CASTS:
        n = NORM_CASTS.index(cast)
        yield Case(
            f"rms_norm {cast}",
            "forward",
            size(x, out, rstd),
            lambda n=n: kernels.layer_rms_norm(x, None, weight, 1e-5, n, out, None, rstd),
        )
        yield Case(
            f"rms_norm {cast}",
            "backward",
            size(x, residual, out, partials, rstd),
            lambda n=n: kernels.layer_rms_norm_backward(residual, None, x, weight, rstd, n, out, partials),
        )
    yield Case(
        "residual_rms_norm",
        "forward",
        size(x, residual, out, total, rstd),
        lambda: kernels.layer_rms_norm(x, residual, weight, 1e-5, 0, out, total, rstd),
    )
    yield Case(
        "residual_rms_norm",
        "backward",
        size(x, residual, total, out, partials, rstd),
        lambda: kernels.layer_rms_norm_backward(residual, total, x, weight, rstd, 0, out, partials),
    )


def gate_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the gated activations of (rows, width), of two tensors and of one that holds both."""
    kernels = torch.ops.trl_fast
    gate, up, grad, out, other = (torch.randn(rows, width).to(dtype) for _ in range(5))
    both, grad_both = (torch.randn(rows, 2 * width).to(dtype) for _ in range(2))
    for n, activation in enumerate(ACTIVATIONS):
        yield Case(
            f"gated_activation {activation}",
            "forward",
            size(gate, up, out),
            lambda n=n: kernels.layer_gated_activation(gate, up, n, out),
        )
        yield Case(
            f"gated_activation {activation}",
            "backward",
            size(grad, gate, up, out, other),
            lambda n=n: kernels.layer_gated_activation_backward(grad, gate, up, n, out, other),
        )
    halves, grads = both.chunk(2, dim=-1), grad_both.chunk(2, dim=-1)
    yield Case(
        "chunked_gated_activation silu",
        "forward",
        size(both, out),
        lambda: kernels.layer_gated_activation(*halves, 0, out),
    )
    yield Case(
        "chunked_gated_activation silu",
        "backward",
        size(grad, both, grad_both),
        lambda: kernels.layer_gated_activation_backward(grad, *halves, 0, *grads),
    )


def rotary_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the rotations of rows of heads, alone and with norms."""
    kernels = torch.ops.trl_fast
    shape = 1, rows, width // HEAD_WIDTH, HEAD_WIDTH
    x, grad, out = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3))
    cos, sin = (torch.randn(1, rows, HEAD_WIDTH).to(dtype) for _ in range(2))
    weight, rstd = torch.ones(HEAD_WIDTH, dtype=dtype), torch.ones(rows * shape[2])
    partials = torch.ones(-(-rows // 16), HEAD_WIDTH)
    for n, pairs in enumerate(PAIRS):
        yield Case(
            f"rotary {pairs}",
            "both alike",
            size(x, out, cos, sin),
            lambda n=n: kernels.layer_rotary(x, cos, sin, n, False, False, False, out),
        )
    way = cos, sin, 0, False, False
    yield Case(
        "qk_norm_rotary",
        "forward",
        size(x, out, cos, sin, rstd),
        lambda: kernels.layer_norm_rotary(x, weight, 1e-5, 0, *way, out, rstd),
    )
    yield Case(
        "qk_norm_rotary",
        "backward",
        size(x, grad, out, cos, sin, rstd, partials),
        lambda: kernels.layer_norm_rotary_backward(grad, x, weight, rstd, 0, *way, out, partials),
    )


def embedding_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yields the gradient of an embedding of as many tokens as rows, of which many come twice and many never."""
    grad, out = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    ids, order = torch.sort(torch.randint(rows, (rows,)), stable=True)
    tokens, counts = torch.unique_consecutive(ids, return_counts=True)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    yield Case(
        "embedding",
        "backward",
        size(grad, out, order),
        lambda: torch.ops.trl_fast.layer_embedding_gradient(grad, order, offsets, tokens, False, out),
    )


def shortest(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Returns the shortest CPU seconds of each of several calls, which are made in turns."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.thread_time()
            run()
            best[i] = min(best[i], time.thread_time() - start)
    return best


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Returns a case's seconds, bytes a second, and these as a share of a copy's of as many bytes."""
    source, target = (torch.ones(case.num_bytes // 2, dtype=torch.uint8) for _ in range(2))
    seconds, of_copy = shortest([case.run, lambda: target.copy_(source)], rounds)
    return {
        "seconds": seconds,
        "bytes": case.num_bytes,
        "gigabytes_a_second": case.num_bytes / seconds / 1e9,
        "share_of_copy": of_copy / seconds,
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--inner", type=int, help="the width of gated activations; by default that of the others")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a part of the names of ops")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not load_extension().ok:
        raise SystemExit(load_extension().reason)
    before = os.getloadavg()[0]
    table = Table(
        "op", "direction", *(str(dtype).removeprefix("torch.") for dtype in DTYPES), title="GB/s, of a copy's"
    )
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for dtype in DTYPES:
        for make in (norm_cases, gate_cases, rotary_cases, embedding_cases):
            width = arguments.inner if make is gate_cases and arguments.inner else arguments.width
            for case in make(arguments.rows, width, dtype):
                if arguments.only in case.op:
                    rows.setdefault((case.op, case.direction), []).append(measure(case, arguments.rounds))
    for (op, direction), measured in rows.items():
        cells = (f"{m['gigabytes_a_second']:.1f}, {m['share_of_copy']:.0%}" for m in measured)
        table.add_row(op, direction, *cells)
    Console().print(table)
    facts = {
        "machine": describe_machine(),
        "load": [before, os.getloadavg()[0]],
        "rows": arguments.rows,
        "width": arguments.width,
        "inner": arguments.inner or arguments.width,
        "measured": [
            {"op": op, "direction": direction, "dtypes": dict(zip(map(str, DTYPES), measured, strict=True))}
            for (op, direction), measured in rows.items()
        ],
    }
    if not arguments.only:
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
