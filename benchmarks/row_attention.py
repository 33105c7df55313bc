"""Times attention of a row on the CPU: our kernels, one call a row, against torch's flash kernel, called part by part.

    python -m benchmarks.row_attention [--tokens 512 1280 4096] [--dtype float32] [--heads 9 3 64] [--threads 1]

Forward and backward of one layer, in turns in one process; the heads are SmolLM2-135M's: query heads, key heads,
width. A row is one sequence, a prompt of half its tokens with four branches, or sequences of 40 tokens. The figures
are the shortest times of all rounds: CPU time with one thread, since others may be at work on the machine, wall-clock
time with more. Rounds of a row end after `--seconds`, but two are made: in all it takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trl_fast.data.segments import TreeLengths, num_tokens
from trl_fast.modeling.attention.cpu import CompiledRowAttention, CpuRowAttention
from trl_fast.modeling.attention.row_attention import RowAttention, RowMask
from trl_fast.modeling.attention.tree_attention import attention_spec

from .machine_info import describe_machine
from .timing import milliseconds

RESULTS = Path(__file__).parent / "results"
KERNELS: dict[str, type[RowAttention]] = {"ours": CompiledRowAttention, "torch": CpuRowAttention}
SHORT = 40

# Seconds of forward and of backward, a pair a round, by the name of the kernels.
Times = dict[str, list[tuple[float, float]]]


def rows_of(tokens: int) -> dict[str, tuple[TreeLengths, ...]]:
    """Returns the trees of each kind of row of about so many tokens."""
    return {
        "one sequence": ((tokens,),),
        "four branches": ((tokens // 2, *[tokens // 8] * 4),),
        f"sequences of {SHORT}": ((SHORT,),) * (tokens // SHORT),
    }


def step_of(
    trees: tuple[TreeLengths, ...], heads: list[int], dtype: torch.dtype, clock: Callable[[], float]
) -> Callable[[type[RowAttention]], tuple[float, float]]:
    """Returns what makes one step of a row by some kernels and returns the seconds of forward and of backward."""
    tokens = sum(map(num_tokens, trees))
    num_heads, key_heads, width = heads
    made = [torch.randn(1, tokens, n, width, dtype=dtype) for n in (num_heads, key_heads, key_heads, num_heads)]
    # As projections give them: the heads of a token side by side.
    query, key, value, grad = (x.transpose(1, 2) for x in made)
    spec = attention_spec(query, RowMask(trees))

    def step(kernels: type[RowAttention]) -> tuple[float, float]:
        start = clock()
        out, lse = kernels(query, key, value, spec).forward()
        between = clock()
        kernels(query, key, value, spec).backward(grad, out, lse)
        return between - start, clock() - between

    return step


def race(step: Callable[[type[RowAttention]], tuple[float, float]], rounds: int, seconds: float) -> Times:
    """Times all kernels in turns, after a warm-up, until rounds or seconds are used up, but twice at least."""
    for kernels in KERNELS.values():
        step(kernels)
    found: Times = {name: [] for name in KERNELS}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - start > seconds:
            break
        for name, kernels in KERNELS.items():
            found[name].append(step(kernels))
    return found


def figures_of(times: Times) -> list[str]:
    """Returns the cells of a row: forward and backward of ours and of torch's, how much slower torch's is."""
    least = []
    for pairs in times.values():
        forward, backward = zip(*pairs, strict=True)
        least.append((min(forward), min(backward), min(map(sum, pairs))))
    texts = [f"{milliseconds(forward)} + {milliseconds(backward)}" for forward, backward, _ in least]
    return texts + [f"{theirs / ours:.2f}×" for ours, theirs in zip(*least, strict=True)]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1280, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="query heads, key heads, width")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=12.0)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    console = Console(width=max(100, Console().width))
    machine = describe_machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    torch.set_num_threads(arguments.threads)
    clock, kind = (time.process_time, "CPU") if arguments.threads == 1 else (time.perf_counter, "wall-clock")
    table = Table(title=f"attention of a row, {arguments.dtype}, heads {arguments.heads}, {kind} milliseconds")
    for name in ("tokens", "row", "ours", "torch", "slower by: forward", "backward", "both"):
        table.add_column(name, justify="right")
    points = []
    for tokens in arguments.tokens:
        for row, trees in rows_of(tokens).items():
            step = step_of(trees, arguments.heads, getattr(torch, arguments.dtype), clock)
            times = race(step, arguments.rounds, arguments.seconds)
            table.add_row(str(tokens), row, *figures_of(times))
            points.append({"tokens": tokens, "row": row, "seconds": times})
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    figures = {"machine": machine, "arguments": vars(arguments), "points": points}
    (RESULTS / f"row_attention_{arguments.dtype}.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
