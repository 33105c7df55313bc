"""Times attention of a preference pair: its prompt once with two branches, against two causal sequences.

    python -m benchmarks.shared_prefix_attention [--prompts 1024 2048 4096 8192 16384] [--ratio 4] [--window 512]

Forward and backward of one layer's attention, in turns in one process, with the heads of Qwen2.5-0.5B (14 query heads,
2 key-value heads, 64 wide). A branch is a `ratio`-th of its prompt. The peer is torch's own
`scaled_dot_product_attention(is_causal=True)` on both sequences as a batch of two; with a sliding window it gets the
mask of all pairs of tokens, as transformers gives it. Memory is what lives beyond inputs and their gradients at the
peak; the mask, which all layers share, is not counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from trl_fast.modeling.attention.tree_attention import tree_attention

from .machine_info import describe_machine
from .memory import MIB
from .timing import Contender, race

RESULTS = Path(__file__).parent / "results"
HEADS, KEY_VALUE_HEADS, WIDTH = 14, 2, 64


def inputs(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Returns query, key, value and the output's gradient."""
    shapes = [(batch, heads, tokens, WIDTH) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS, HEADS)]
    made = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    return [*(tensor.requires_grad_() for tensor in made[:3]), made[3]]


def contenders(
    prompt: int, branch: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[Contender]:
    """Returns the contenders: one tree in one row, and two sequences with the prompt in each."""
    tree = (prompt, branch, branch)
    shared = inputs(1, sum(tree), dtype, device)
    apart = inputs(2, prompt + branch, dtype, device)
    places = torch.arange(prompt + branch, device=device)
    behind = places[:, None] - places
    mask = None if window is None else ((behind >= 0) & (behind < window)).expand(2, 1, -1, -1)

    def ours() -> None:
        query, key, value, grad = shared
        torch.autograd.grad(tree_attention(query, key, value, (tree,), window=window), (query, key, value), grad)

    def two_sequences() -> None:
        query, key, value, grad = apart
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        torch.autograd.grad(out, (query, key, value), grad)

    def gradient_bytes(given: list[torch.Tensor]) -> int:
        return sum(tensor.nbytes for tensor in given[:3])

    return [
        Contender("shared prefix", ours, result_bytes=gradient_bytes(shared)),
        Contender("two sequences", two_sequences, result_bytes=gradient_bytes(apart)),
    ]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--ratio", type=int, default=4, help="a prompt's length in branches")
    parser.add_argument("--window", type=int, help="the last tokens that a token sees; all if unset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    console = Console(width=max(100, Console().width))
    machine = describe_machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window = "" if arguments.window is None else f", a window of {arguments.window}"
    table = Table(title=f"attention of a pair, forward and backward, {arguments.dtype}{window}")
    for name in ("prompt", "branch", "shared prefix, s", "two sequences, s", "slower by", "MiB", "two sequences, MiB"):
        table.add_column(name, justify="right")
    points = []
    for prompt in arguments.prompts:
        branch = prompt // arguments.ratio
        runs = contenders(prompt, branch, arguments.window, getattr(torch, arguments.dtype), device)
        race(runs, arguments.rounds, float("inf"), device, f"{prompt} tokens")
        ours, peer = runs
        table.add_row(
            *(str(prompt), str(branch), f"{ours.median:.3f}", f"{peer.median:.3f}"),
            *(f"{peer.median / ours.median:.2f}×", f"{ours.extra_bytes / MIB:.0f}", f"{peer.extra_bytes / MIB:.0f}"),
        )
        points.append(
            {"prompt": prompt, "branch": branch}
            | {run.name: {"seconds": run.seconds, "extra_bytes": run.extra_bytes} for run in runs}
        )
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    figures = {"machine": machine, "arguments": vars(arguments), "points": points}
    name = "shared_prefix_attention" if arguments.window is None else f"window_{arguments.window}_attention"
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
