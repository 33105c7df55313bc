"""Counted work of the head, ours and TRL 1.16's, against a roofline. No GPU is needed, nothing is timed.

    python -m benchmarks.roofline [--sizes 8192/4096/151936 ...] [--modes "trained token" ...] [--gpu h100|h200]
                                  [--operators] [--json FILE]

Both run on fake tensors, which have shapes but no data, and every operator is intercepted: its products' FLOPs, the
bytes that it reads and writes, kernel launches, places where the host waits, and the peak of memory beyond inputs and
gradients. TRL's code is its own; of its Triton kernels, which cannot be run, `trl_kernels.py` says what they touch.

A tensor that an operator is given is read once from memory, one that it makes is written once, whatever a cache holds
in between. Views are free. A product's factors that were there before (hidden states, weights) are not counted: the
floor's products read them too, and the rate of products contains it. All other bytes count, for TRL alike.

Milliseconds are ESTIMATES by a named roofline (`gpus.py`): FLOPs at the rate that a GPU's large products reach, plus
bytes at the rate that its memory reaches. Bytes are taken as not hidden behind products, launches and host waits as
free, padding of small tiles as nothing. The floor is 1, 2 or 3 passes (scoring, frozen, trained head) of 2·N·V·H FLOPs
and no byte. Triton kernels of ours are not counted: what is counted is the backend "cuda", and scoring in two steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from .gpus import GPUS
from .head import MODES, SIZES, count_head, misses, parse_size
from .report import head_facts, print_head, roofline_of


def main() -> None:
    """Counts what was asked for and prints it."""
    arguments = _parse()
    console = Console()
    gpu = GPUS[arguments.gpu]
    wanted = [(size, mode) for mode in arguments.modes for size in arguments.sizes]
    progress = track(wanted, "Counting", console=console, transient=True)
    cases = [count_head(*case, gpu, arguments.workspace) for case in progress]
    print_head(console, cases, arguments.operators)
    console.print(roofline_of(gpu))
    for miss in misses(cases):
        console.print(f"[red]beyond its bound:[/] {miss}")
    if arguments.json:
        arguments.json.write_text(json.dumps([head_facts(case) for case in cases], indent=1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=_size, default=list(SIZES), help="rows/hidden/vocabulary")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="whose roofline")
    parser.add_argument("--workspace", type=int, help="workspace_bytes of ours; default: what it takes itself")
    parser.add_argument("--operators", action="store_true", help="print what each case consists of")
    parser.add_argument("--json", type=Path, help="write everything that was counted to this file")
    return parser.parse_args()


def _size(text: str):
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main()
