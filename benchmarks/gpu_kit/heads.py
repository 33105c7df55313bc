"""Races the head against its peers and its floor, mode by mode and size by size.

Rows are peaked as those of a trained model are: the target's logit is 0 to 20 above the others', so that every peer's
shortcut for improbable tokens is worth what it is on real text.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from trl_fast.ops import BACKENDS, linear_logprob, linear_token_loss, supports

from ..head_problem import Problem
from ..head_size import Size
from ..library_heads import LIBRARY_HEADS
from ..linear_logprob import trl
from .ceilings import random_matrix, sizes
from .gpu_timing import Timed
from .phase_context import Kit

MODES = ("scoring", "frozen", "token", "logprob")
PASSES = {"scoring": 1, "frozen": 2, "token": 3, "logprob": 3}
FLOOR, TRL = "floor", "TRL"


def run(kit: Kit) -> None:
    for size in sizes(kit):
        if kit.late(f"race at {size}", 12):
            return
        problem = peaked_problem(size, kit.device)
        for mode in MODES:
            if kit.late(f"race {mode} at {size}", 3):
                return
            race_mode(kit, size, problem, mode)
        del problem
        kit.clock.release()


def race_mode(kit: Kit, size: Size, problem: Problem, mode: str) -> None:
    """Yields one line of facts a contender."""
    contenders = [Timed(name, call) for name, call in all_contenders(problem, mode)]
    kit.clock.race(contenders)
    for contender in contenders:
        what = f"{mode}: {contender.name}"
        if contender.failure is not None:
            kit.facts.skip(what, contender.failure, size=str(size))
            continue
        rate = PASSES[mode] * size.pass_flops / contender.median / 1e9
        spread = {"min_ms": min(contender.ms), "max_ms": max(contender.ms)}
        extra = contender.extra_bytes
        kit.facts.add(what, size=str(size), ms=contender.median, **spread, tflops=rate, extra_bytes=extra)


def peaked_problem(size: Size, device: torch.device) -> Problem:
    """Returns hidden (N, H), weight (V, H) bfloat16, targets (N,); the target's logit stands out by 0 to 20."""
    torch.manual_seed(0)
    n, h, v = size
    weight, hidden = random_matrix(v, h, device, h**-0.5), random_matrix(n, h, device)
    targets = torch.randint(0, v, (n,), device=device)
    margins = 20 * torch.rand(n, 1, device=device)
    hidden += (margins * F.normalize(weight[targets].float(), dim=1)).to(hidden.dtype)
    return Problem(hidden, weight, targets, torch.randn(n, device=device) / n)


def all_contenders(problem: Problem, mode: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Returns ours by backend, the peers that can do the same, and the bare products."""
    wanted = problem.for_mode("trained" if mode in ("token", "logprob") else mode)
    for backend in BACKENDS[:2] if problem.hidden.is_cuda else ("torch",):
        if supports("linear_logprob", backend, problem.hidden.device, problem.hidden.dtype).ok:
            if mode != "token":
                yield f"ours {backend}", functools.partial(_logprob, wanted, backend)
            if mode in ("token", "frozen"):
                name = f"ours {backend}" if mode == "token" else f"ours {backend}, by token"
                yield name, functools.partial(_token_loss, wanted, backend)
    yield from _peers(wanted, mode)
    yield FLOOR, bare_products(problem, mode)


def _logprob(problem: Problem, backend: str) -> None:
    problem.finish(linear_logprob(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs)


def _token_loss(problem: Problem, backend: str) -> None:
    given = (problem.hidden, problem.weight, problem.targets)
    linear_token_loss(
        *given, lambda s, rows: (s.logprobs * problem.upstream[rows]).sum(), backend=backend
    ).loss.backward()
    problem.hidden.grad = problem.weight.grad = None


def _peers(problem: Problem, mode: str) -> Iterator[tuple[str, Callable[[], object]]]:
    if importlib.util.find_spec("trl"):
        yield TRL, trl(problem)
    for name, head in LIBRARY_HEADS.items():
        if head.why_not is None and (head.by_token or mode in ("token", "frozen")):
            yield name, head.make(problem)


def bare_products(problem: Problem, mode: str) -> Callable[[], object]:
    """Returns the mode's products, each one call over all rows and columns, results in bfloat16: the floor."""
    x, w = problem.hidden.detach(), problem.weight.detach()

    def call() -> None:
        logits = x @ w.t()
        if mode != "scoring":
            logits @ w
        if PASSES[mode] == 3:
            logits.t() @ x

    return call
