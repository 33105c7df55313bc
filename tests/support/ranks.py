"""Runs a function in several processes that train together, forked from this one: no import is repeated."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from support.cpu_engines import launcher_environment, take_engines_on_cpu
from support.killing import forked

# Ranks that take longer hang.
PATIENCE = 60


class RankError(AssertionError):
    """Says that a rank failed or hung, with its traceback and what it printed last."""


def run_on_ranks(
    work: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    engine: str | None = "ddp",
    mixed_precision: str = "no",
    environment: dict[str, str] | None = None,
    patience: float = PATIENCE,
) -> list[Any]:
    """Runs `work(*args)` in `ranks` forks of this process, and returns what each rank returned, in their order.

    Each fork has a thread, and finds the environment of a process that `accelerate launch` has started with the
    shipped configuration of an engine ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"; None: only torchrun's).
    The process group (gloo) is made by who asks first: accelerate, or `torch.distributed.init_process_group`.

    Raises:
        RankError: a rank raised, died or took longer than `patience` seconds; the others are killed.
    """
    variables = {} if engine is None else launcher_environment(engine, ranks, mixed_precision)
    variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    variables |= environment or {}
    if "ACCELERATE_USE_DEEPSPEED" in variables:
        # Once for all forks; it looks for the accelerator while it is imported.
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [_fork(work, args, rank, variables, folder, patience) for rank in range(ranks)]
        failed = _wait(processes, patience + 5)
        if failed:
            raise RankError("\n".join(_report(folder, rank, status) for rank, status in failed.items()))
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _fork(
    work: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    variables: dict[str, str],
    folder: Path,
    patience: float,
) -> int:
    def work_as_rank() -> None:
        _become_rank(rank, variables)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(*args)))

    return forked(work_as_rank, folder / f"{rank}.log", patience)


def _become_rank(rank: int, variables: dict[str, str]) -> None:
    os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    # What this test's process has found out about itself is not true of a rank.
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    take_engines_on_cpu()


def _wait(processes: list[int], patience: float) -> dict[int, int]:
    """Waits for all ranks, and kills the others shortly after one has failed; the status of each that failed."""
    end, running, failed = time.monotonic() + patience, dict(enumerate(processes)), {}
    while running:
        for rank, process in list(running.items()):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                del running[rank]
                if status:
                    failed[rank] = os.waitstatus_to_exitcode(status)
                    end = min(end, time.monotonic() + 2)
        if running and time.monotonic() > end:
            for rank, process in running.items():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                failed.setdefault(rank, -signal.SIGKILL)
            break
        time.sleep(0.002)
    return failed


def _report(folder: Path, rank: int, status: int) -> str:
    log = folder / f"{rank}.log"
    said = log.read_text(errors="replace")[-6000:] if log.exists() else ""
    return f"rank {rank} ended with status {status}:\n{said}"
