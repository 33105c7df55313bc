"""Times the loss head against its peers and against its floor, the bare matrix products.

    python -m benchmarks.linear_logprob [--rows 1024 --hidden 896 --vocab 151936 --dtype bfloat16 --rounds 3]

Prints, for a trained head, a frozen head and scoring without gradient: median seconds with min and max, the ratio to
the floor and to TRL, and the peak of memory beyond inputs and gradients. Liger and cut-cross-entropy run on GPUs only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from trl_fast.ops import BACKENDS, linear_logprob, linear_token_loss, supports
from trl_fast.ops.matmul import gemm_dtype

from .head_problem import Problem, make_problem
from .library_heads import heads_for
from .machine_info import cpu_name
from .memory import MIB
from .timing import Contender, milliseconds, race

MODES = ("trained", "frozen", "scoring")
FLOOR, TRL = "floor: bare GEMMs", "TRL 1.16.0"
BY_TOKEN = "ours by token"
PLAIN, CHUNKED = "plain PyTorch, fp32 log-softmax", "F.linear_cross_entropy, chunked"


def ours(problem: Problem, backend: str) -> Callable[[], None]:
    def run() -> None:
        problem.finish(linear_logprob(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs)

    return run


def ours_by_token(problem: Problem, backend: str) -> Callable[[], None]:
    """Computes the same loss as a sum over tokens, with gradients taken in forward: no logits are kept."""
    upstream = problem.upstream

    def run() -> None:
        given = (problem.hidden, problem.weight, problem.targets)
        linear_token_loss(*given, lambda s, rows: (s.logprobs * upstream[rows]).sum(), backend=backend).loss.backward()
        problem.hidden.grad = problem.weight.grad = None

    return run


def trl(problem: Problem) -> Callable[[], None]:
    def run() -> None:
        from trl.kernels import ChunkedLogProbFunction

        out = ChunkedLogProbFunction.apply(
            problem.hidden, problem.weight, None, problem.targets, 1.0, 32768, None, 1.0, ()
        )
        problem.finish(out[0])

    return run


def plain(problem: Problem) -> Callable[[], None]:
    """Computes log-probs by whole logits and log-softmax in float32."""

    def run() -> None:
        logits = F.linear(problem.hidden, problem.weight).float()
        problem.finish(logits.log_softmax(-1).gather(1, problem.targets[:, None]).squeeze(1))

    return run


def torch_chunked(problem: Problem) -> Callable[[], None]:
    """Runs torch's own chunked linear cross-entropy; its `none` reduction has per-token losses as we have."""
    options = torch.nn.LinearCrossEntropyOptions()

    def run() -> None:
        losses = F.linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none", options=options
        )
        problem.finish(-losses.float())

    return run


def gradient_bytes(problem: Problem) -> int:
    """Counts the bytes of the gradients that any contender hands back; the floor's lie there before it starts."""
    wanted = (x for x in (problem.hidden, problem.weight) if x.requires_grad)
    return sum(x.numel() * x.element_size() for x in wanted)


def our_backends(problem: Problem) -> list[str]:
    """Returns the names of the backends that can serve here, the best first."""
    given = (problem.hidden.device, problem.hidden.dtype)
    return [backend for backend in BACKENDS if supports("linear_logprob", backend, *given).ok]


def peers(problem: Problem, mode: str) -> dict[str, Callable[[], None]]:
    """Returns the peers by name; the problem's gradients are those that the mode wants."""
    found = {TRL: trl(problem), PLAIN: plain(problem)}
    if mode == "trained":
        found[CHUNKED] = torch_chunked(problem)
    return found


def contenders(
    problem: Problem, mode: str, skip: set[str], *, by_token: bool = False, libraries: bool = False
) -> list[Contender]:
    """Returns ours by backend, the peers and the floor, without those whose name contains a word of `skip`.

    by_token: with a trained head also our op for losses that are sums over tokens. libraries: also the heads of other
    libraries than TRL and torch.
    """
    wanted = problem.for_mode(mode)
    runs = {f"ours, {backend}": ours(wanted, backend) for backend in our_backends(problem)}
    if by_token and mode == "trained":
        runs |= {f"{BY_TOKEN}, {backend}": ours_by_token(wanted, backend) for backend in our_backends(problem)}
    runs |= peers(wanted, mode)
    if libraries:
        runs |= heads_for(wanted, sums_only=mode != "scoring")
    found = [Contender(name, run, result_bytes=gradient_bytes(wanted)) for name, run in runs.items()]
    if not any(word in FLOOR for word in skip):
        found.append(Contender(FLOOR, problem.floor.step(mode)))
    return [c for c in found if not any(word in c.name for word in skip)]


def report(console: Console, mode: str, raced: list[Contender]) -> list[dict]:
    by_name = {c.name: c for c in raced}
    table = Table(title=f"{mode} head" if mode != "scoring" else "scoring, no gradient")
    for column in ("", "median ms", "min – max ms", "× floor", "TRL is slower by", "extra MiB", "runs"):
        table.add_column(column, justify="left" if not column else "right")
    rows = []
    for c in raced:
        if c.failure is not None:
            rows.append({"mode": mode, "name": c.name, "not_run": c.failure})
            table.add_row(c.name, "not run")
            continue
        to_floor = c.median / by_name[FLOOR].median
        to_trl = by_name[TRL].median / c.median if TRL in by_name else None
        rows.append(
            {
                "mode": mode,
                "name": c.name,
                "seconds": c.seconds,
                "median": c.median,
                "over_floor": to_floor,
                "trl_over_this": to_trl,
                "extra_bytes": c.extra_bytes,
            }
        )
        spread = f"{milliseconds(min(c.seconds))} – {milliseconds(max(c.seconds))}"
        slower = "" if to_trl is None else f"{to_trl:.2f}×"
        cells = (milliseconds(c.median), spread, f"{to_floor:.2f}", slower, f"{c.extra_bytes / MIB:.0f}")
        table.add_row(c.name, *cells, str(len(c.seconds)))
    console.print(table)
    for c in raced:
        if c.failure is not None:
            console.print(f"{c.name}: not run: {c.failure}", soft_wrap=True)
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds; slower contenders run only once")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--skip", nargs="*", default=[], help="leave out contenders whose name contains one of these")
    parser.add_argument("--by_token", action="store_true", help="with a trained head, also race linear_token_loss")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=max(110, Console().width))
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    problem = make_problem(arguments.rows, arguments.hidden, arguments.vocab, dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    isa = torch.backends.cpu.get_cpu_capability()
    console.print(
        f"N={arguments.rows} H={arguments.hidden} V={arguments.vocab} {dtype}, {device.type} ({name}, {isa}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; our products and the floor's run in "
        f"{gemm_dtype(problem.hidden)}"
    )
    figures = []
    for mode in arguments.modes:
        raced = contenders(problem, mode, set(arguments.skip), by_token=arguments.by_token, libraries=True)
        race(raced, arguments.rounds, arguments.patience, device, mode, keep_going=True)
        figures += report(console, mode, raced)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"arguments": vars(arguments), "figures": figures}, indent=1, default=str)
        )


if __name__ == "__main__":
    main()
