"""Times what layers cost the host: forward and backward on a few numbers, where kernels take next to nothing.

    python -m benchmarks.host_time [--calls 200 --rounds 15]

On a GPU, kernels of a small model end before the host has started the next ones. PyTorch's code, the fused ops in
Python (which compilers see) and those whose backward passes are in C++ run in turns on one thread; the shortest CPU
time of each counts, so that other processes disturb least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from trl_fast.ops.layers import (
    gated_activation,
    norm_and_residual,
    qk_norm_rotary,
    residual_rms_norm,
    rms_norm,
    rotary,
)

from .machine_info import describe_machine

EPS, WIDTH, HEAD_WIDTH = 1e-6, 64, 16


class Layer(NamedTuple):
    """Holds what a layer computes, in PyTorch and fused, and the shapes of what it is given."""

    name: str
    plain: Callable
    fused: Callable
    shapes: tuple[tuple[int, ...], ...]


def layers() -> Iterator[Layer]:
    """Yields the parts of a decoder layer that are fused, on one row of 8 tokens."""
    norm, query_norm, key_norm = (LlamaRMSNorm(width, EPS) for width in (WIDTH, HEAD_WIDTH, HEAD_WIDTH))
    rows, heads = ((1, 8, WIDTH),), ((1, 4, 8, HEAD_WIDTH), (1, 2, 8, HEAD_WIDTH))
    cos, sin = torch.randn(2, 1, 8, HEAD_WIDTH)

    def plain_sum(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return norm(total), total

    weights = query_norm.weight, key_norm.weight
    yield Layer("norm", norm, lambda x: rms_norm(x, norm.weight, EPS), rows)
    yield Layer(
        "norm beside the residual", lambda x: (norm(x), x), lambda x: norm_and_residual(x, norm.weight, EPS), rows
    )
    yield Layer(
        "residual and norm", plain_sum, lambda x, residual: residual_rms_norm(x, residual, norm.weight, EPS), rows * 2
    )
    yield Layer("gate", lambda gate, up: F.silu(gate) * up, gated_activation, rows * 2)
    yield Layer(
        "rotation", lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), lambda q, k: rotary(q, k, cos, sin), heads
    )
    yield Layer(
        "norms and rotation",
        lambda q, k: apply_rotary_pos_emb(query_norm(q), key_norm(k), cos, sin),
        lambda q, k: qk_norm_rotary(q, k, *weights, EPS, cos, sin),
        heads,
    )


@contextmanager
def ops_in_python() -> Iterator[None]:
    """Lets the layers' ops run in Python within."""
    with ExitStack() as stack:
        for name, module in [*sys.modules.items()]:
            if name.startswith("trl_fast.ops.layers.") and hasattr(module, "eager_op"):
                stack.enter_context(mock.patch.object(module, "eager_op", return_value=None))
        yield


def microseconds(run: Callable, shapes: tuple[tuple[int, ...], ...], calls: int) -> float:
    """Measures the CPU time of a call, forward and backward, as the mean of so many."""
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    made = run(*given)
    grads = [torch.ones_like(out) for out in ([made] if isinstance(made, torch.Tensor) else made)]
    start = time.process_time()
    for _ in range(calls):
        torch.autograd.backward(run(*given), grads, inputs=given)
    return 1e6 * (time.process_time() - start) / calls


CONTENDERS = {"PyTorch": nullcontext, "in Python": ops_in_python, "in C++": nullcontext}


def measure(layer: Layer, calls: int, rounds: int) -> dict[str, float]:
    """Times the contenders in turns; microseconds a call."""
    best = dict.fromkeys(CONTENDERS, float("inf"))
    for _ in range(rounds):
        for name, context in CONTENDERS.items():
            with context():
                spent = microseconds(layer.plain if name == "PyTorch" else layer.fused, layer.shapes, calls)
            best[name] = min(best[name], spent)
    return best


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    console = Console()
    machine = describe_machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    table = Table(title="host time of a call, forward and backward")
    for column in ("", *(f"{name}, µs" for name in CONTENDERS), "PyTorch / C++", "Python / C++"):
        table.add_column(column, justify="left" if not column else "right")
    for layer in track([*layers()], description="layers", transient=True):
        plain, python, compiled = measure(layer, arguments.calls, arguments.rounds).values()
        table.add_row(
            layer.name,
            *(f"{spent:.0f}" for spent in (plain, python, compiled)),
            f"{plain / compiled:.2f}×",
            f"{python / compiled:.2f}×",
        )
    console.print(table)


if __name__ == "__main__":
    main()
