"""Checks the divergence of two heads on every backend against float64, and races it against TRL's and its floor."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from trl_fast.ops import BACKENDS, linear_divergence, supports

from ..head_size import Size
from ..linear_divergence import Pair, ours, trl
from .ceilings import random_matrix, sizes
from .correctness import DTYPES, TOLERANCE, Checked, backends_for, compare, report_checks
from .float64_cases import EVERY_TRANSFORM, HeadProblem, Tensors
from .gpu_timing import Timed
from .heads import FLOOR, TRL, bare_products, peaked_problem
from .phase_context import Kit

OP, OUTPUTS = "linear_divergence", ("divergence", "entropy")
TEACHER_TRANSFORM = {"teacher_softcap": 5.0, "teacher_logit_scale": -1.2}


class Case(NamedTuple):
    """Holds a kind of divergence with its beta, and whether both heads have a bias, a cap and a scale."""

    kind: str
    beta: float
    transformed: bool

    def __str__(self) -> str:
        return f"{OP}, {self.kind}, beta={self.beta:g}{', transformed' * self.transformed}"


KINDS = (
    *(("jsd", beta) for beta in (0.0, 1.0, 0.3)),
    *((kind, 0.1) for kind in ("skewed_forward_kl", "skewed_reverse_kl", "tvd")),
)
CASES = tuple(Case(kind, beta, transformed) for kind, beta in KINDS for transformed in (False, True))
# Of the race: which beta, and whether the student's weight trains.
RACES = {"forward KL": (0.0, True), "JSD": (0.5, True), "JSD, frozen": (0.5, False)}


def run(kit: Kit) -> None:
    """Adds facts: one a failure, a count, and one a contender of the race."""
    small = {"rows": 9, "hidden": 16, "vocab": 301} if kit.tiny else {}
    report_checks(kit, {"divergences": functools.partial(check_divergences, kit.device, **small)})
    for size in sizes(kit)[:2]:
        if kit.late(f"race at {size}", 10):
            return
        race_size(kit, size)
        kit.clock.release()


def check_divergences(
    device: torch.device, rows: int = 300, hidden: int = 128, vocab: int = 32003
) -> Iterator[Checked]:
    """Checks every kind on every backend and in every dtype: scores, loss and gradients."""
    for dtype in DTYPES:
        student = HeadProblem.random(rows, hidden, vocab, dtype, device)
        teacher = HeadProblem.random(rows, hidden + 32, vocab, dtype, device)
        for case in CASES:
            exact = functools.cache(functools.partial(_exact, case, student, teacher))
            for backend in backends_for(OP, device, dtype):
                # A few row blocks.
                room = rows * vocab * 8 // 3 if backend != "torch" else None
                found = functools.partial(_ours, case, student, teacher, backend, room)
                yield compare(f"{case}, {backend}, {dtype}".replace("torch.", ""), found, exact, TOLERANCE[dtype])


def _ours(case: Case, student: HeadProblem, teacher: HeadProblem, backend: str, room: int | None) -> Tensors:
    leaves, options = student.leaves("trained"), {}
    if case.transformed:
        options = {**EVERY_TRANSFORM, **TEACHER_TRANSFORM, "bias": leaves["bias"], "teacher_bias": teacher.bias}
    given = (leaves["hidden"], leaves["weight"], teacher.hidden, teacher.weight)
    more = {"weights": student.counts, "outputs": OUTPUTS, "backend": backend, "workspace_bytes": room}
    found = linear_divergence(*given, kind=case.kind, beta=case.beta, **options, **more)
    # A row that does not count has no score.
    counts = student.counts != 0
    scores = {name: getattr(found.scores, name)[counts] for name in OUTPUTS}
    return _with_gradients(scores, found.loss, leaves, case, student.hidden.dtype)


def _exact(case: Case, student: HeadProblem, teacher: HeadProblem) -> Tensors:
    leaves = student.leaves("trained", torch.float64)
    other = teacher.leaves("scoring", torch.float64)
    numbers = {**EVERY_TRANSFORM, **TEACHER_TRANSFORM} if case.transformed else {}
    bias = (leaves["bias"], other["bias"]) if case.transformed else (None, None)
    temperature = numbers.get("temperature", 1.0)
    logp_s = _log_softmax(leaves, bias[0], numbers.get("softcap"), numbers.get("logit_scale", 1.0), temperature)
    caps = (numbers.get("teacher_softcap"), numbers.get("teacher_logit_scale", 1.0))
    logp_t = _log_softmax(other, bias[1], *caps, temperature)
    divergence = _divergence(case, logp_s, logp_t)
    counts = student.counts != 0
    scores = {"divergence": divergence[counts], "entropy": -(logp_s.exp() * logp_s).sum(-1)[counts]}
    return _with_gradients(scores, (divergence * student.counts).sum(), leaves, case, student.hidden.dtype)


def _log_softmax(
    head: Tensors, bias: torch.Tensor | None, softcap: float | None, scale: float, temperature: float
) -> torch.Tensor:
    """Returns whole log-probabilities (N, V) of a head."""
    logits = head["hidden"] @ head["weight"].T
    logits = (logits if bias is None else logits + bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)


def _divergence(case: Case, logp_s: torch.Tensor, logp_t: torch.Tensor) -> torch.Tensor:
    """Returns the divergences (N,) as their papers write them."""
    p_s, p_t = logp_s.exp(), logp_t.exp()
    if case.kind == "tvd":
        return 0.5 * (p_s - p_t).abs().sum(-1)
    share = 1 - case.beta if case.kind == "skewed_reverse_kl" else case.beta
    log_m = ((1 - share) * p_s + share * p_t).log()
    of_teacher, of_student = (p_t * (logp_t - log_m)).sum(-1), (p_s * (logp_s - log_m)).sum(-1)
    if case.kind == "jsd" and 0 < case.beta < 1:
        return case.beta * of_teacher + (1 - case.beta) * of_student
    return of_teacher if case.kind == "skewed_forward_kl" or share == 0 else of_student


def _with_gradients(scores: Tensors, loss: torch.Tensor, leaves: Tensors, case: Case, dtype: torch.dtype) -> Tensors:
    wanted = {name: leaf for name, leaf in leaves.items() if name != "bias" or case.transformed}
    if case.kind == "tvd" and dtype != torch.float32:
        wanted = {}  # a gradient follows the sign of p − q, which 16 bits do not tell of every class
    gradients = torch.autograd.grad(loss, list(wanted.values())) if wanted else ()
    named = {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {**{name: score.detach() for name, score in scores.items()}, "loss": loss.detach(), **named}


def race_size(kit: Kit, size: Size) -> None:
    """Adds one fact a contender of each race."""
    student = peaked_problem(size, kit.device)
    teacher = peaked_problem(size, kit.device)
    # Close to the student's, as a teacher is.
    teacher.hidden += random_matrix(size.rows, size.hidden, kit.device, 0.3)
    for name, (beta, trains) in RACES.items():
        if kit.late(f"race of {name} at {size}", 3):
            return
        mode = "trained" if trains else "frozen"
        pair = Pair(student.for_mode(mode), teacher.for_mode("scoring"), beta)
        contenders = [Timed(who, call) for who, call in all_contenders(pair, mode)]
        kit.clock.race(contenders)
        for contender in contenders:
            what = f"{name}: {contender.name}"
            if contender.failure is not None:
                kit.facts.skip(what, contender.failure, size=str(size))
                continue
            rate = (3 + trains) * size.pass_flops / contender.median / 1e9
            kit.facts.add(what, size=str(size), ms=contender.median, tflops=rate, extra_bytes=contender.extra_bytes)


def all_contenders(pair: Pair, mode: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields ours by backend, TRL's where it is installed, and the bare products."""
    hidden = pair.student.hidden
    for backend in BACKENDS[:2] if hidden.is_cuda else ("torch",):
        if supports(OP, backend, hidden.device, hidden.dtype).ok:
            yield f"ours {backend}", ours(pair, backend)
    if importlib.util.find_spec("trl"):
        yield TRL, trl(pair)
    products = (
        bare_products(pair.student, "token" if mode == "trained" else "frozen"),
        bare_products(pair.teacher, "scoring"),
    )
    yield FLOOR, lambda: [call() for call in products]
