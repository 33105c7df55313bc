"""Runs the loss heads of other libraries on a problem: Liger's, and cut-cross-entropy's. Their kernels need a GPU.

pip install liger-kernel==0.8.5 cut-cross-entropy
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from .head_problem import Problem


class LibraryHead(NamedTuple):
    """Describes a head: the package that has it and its module, and what makes a run of a Problem.

    by_token: whether it has losses of single tokens, each with a gradient of its own. Otherwise it has their sum only,
    which cannot stand for log-probabilities of sequences, and which scoring does not ask for.
    """

    package: str
    module: str
    by_token: bool
    make: Callable[[Problem], Callable[[], None]]

    @property
    def why_not(self) -> str | None:
        """Returns why it cannot run here, with the remedy; None if its package is installed."""
        if importlib.util.find_spec(self.module):
            return None
        return f"{self.package} is not installed: pip install {self.package}"


def liger(problem: Problem) -> Callable[[], None]:
    """Makes a run of Liger's fused linear cross-entropy, summed over tokens."""

    def run() -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        loss(problem.weight, problem.hidden, problem.targets).backward()
        problem.hidden.grad = problem.weight.grad = None

    return run


def cut_cross_entropy(problem: Problem, filter_eps: str | None = "auto") -> Callable[[], None]:
    """Makes a run of cut-cross-entropy's losses of tokens.

    filter_eps: "auto" leaves small gradients out by whole blocks, as it comes; None computes all of them.
    """

    def run() -> None:
        from cut_cross_entropy import linear_cross_entropy

        given = (problem.hidden, problem.weight, problem.targets)
        problem.finish(-linear_cross_entropy(*given, reduction="none", filter_eps=filter_eps).float())

    return run


LIBRARY_HEADS = {
    "Liger": LibraryHead("liger-kernel==0.8.5", "liger_kernel", False, liger),
    "cce": LibraryHead("cut-cross-entropy", "cut_cross_entropy", True, cut_cross_entropy),
    "cce exact": LibraryHead(
        "cut-cross-entropy", "cut_cross_entropy", True, lambda problem: cut_cross_entropy(problem, None)
    ),
}


def heads_for(problem: Problem, *, sums_only: bool) -> dict[str, Callable[[], None]]:
    """Returns a run of each head by name. One that cannot run here raises RuntimeError with the reason.

    sums_only: whether those are asked for too that have no losses of single tokens.
    """
    found = {name: head for name, head in LIBRARY_HEADS.items() if head.by_token or sums_only}
    return {name: _run(head, problem) for name, head in found.items()}


def _run(head: LibraryHead, problem: Problem) -> Callable[[], None]:
    reason = head.why_not or (None if problem.hidden.is_cuda else "its kernels need a GPU")

    def refuse() -> None:
        raise RuntimeError(reason)

    return refuse if reason else head.make(problem)
