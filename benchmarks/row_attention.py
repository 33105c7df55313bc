"""Times attention of a row on the CPU: our kernels, one call a row, against torch's flash kernel, called part by part.

    python -m benchmarks.row_attention [--tokens 512 1280 4096] [--threads 1 2] [--heads 9 3 64] [--dtype float32]

Forward and forward with backward of one layer, in turns in one process; the heads are SmolLM2-135M's: query heads, key
heads, width. A row is one sequence, or a prompt of half its tokens with four branches. The figures are the shortest
times of all rounds: others may be at work on the machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trl_fast.data.segments import TreeLengths, num_tokens
from trl_fast.modeling.attention.cpu import CompiledRowAttention, CpuRowAttention
from trl_fast.modeling.attention.row_attention import RowAttention, RowMask
from trl_fast.modeling.attention.tree_attention import attention_spec

from .machine_info import describe_machine
from .timing import Contender, milliseconds, race

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
KERNELS: dict[str, type[RowAttention]] = {"ours": CompiledRowAttention, "torch": CpuRowAttention}


def contenders(trees: tuple[TreeLengths, ...], heads: list[int], dtype: torch.dtype) -> list[Contender]:
    """Returns the contenders of a row of trees: each kind of kernels forward, and forward and backward."""
    tokens = sum(map(num_tokens, trees))
    num_heads, key_heads, width = heads
    made = [torch.randn(1, tokens, n, width, dtype=dtype) for n in (num_heads, key_heads, key_heads, num_heads)]
    # As projections give them: the heads of a token side by side.
    query, key, value, grad = (x.transpose(1, 2) for x in made)
    spec = attention_spec(query, RowMask(trees))

    def forward(kernels: type[RowAttention]) -> None:
        kernels(query, key, value, spec).forward()

    def both(kernels: type[RowAttention]) -> None:
        row = kernels(query, key, value, spec)
        row.backward(grad, *row.forward())

    steps = {"forward": forward, "both": both}
    return [
        Contender(f"{name}, {step}", lambda run=run, kernels=kernels: run(kernels))
        for step, run in steps.items()
        for name, kernels in KERNELS.items()
    ]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1280, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="query heads, key heads, width")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    console = Console(width=max(100, Console().width))
    machine = describe_machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    table = Table(title=f"attention of a row, {arguments.dtype}, heads {arguments.heads}, milliseconds")
    for name in ("threads", "tokens", "row", "forward", "torch", "slower by", "both", "torch", "slower by"):
        table.add_column(name, justify="right")
    points = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for tokens in arguments.tokens:
            rows = {"one sequence": ((tokens,),), "four branches": ((tokens // 2, *[tokens // 8] * 4),)}
            for row, trees in rows.items():
                runs = contenders(trees, arguments.heads, getattr(torch, arguments.dtype))
                race(runs, arguments.rounds, float("inf"), CPU, f"{tokens} tokens, {row}")
                best = [min(run.seconds) for run in runs]
                pairs = [best[:2], best[2:]]
                figures = [text for a, b in pairs for text in (milliseconds(a), milliseconds(b), f"{b / a:.2f}×")]
                table.add_row(str(threads), str(tokens), row, *figures)
                seconds = {run.name: run.seconds for run in runs}
                points.append({"threads": threads, "tokens": tokens, "row": row, "seconds": seconds})
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    figures = {"machine": machine, "arguments": vars(arguments), "points": points}
    (RESULTS / "row_attention.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
