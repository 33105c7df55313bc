"""Tries linear_divergence: two heads of every nature, every kind, rows left out, likeliest tokens, given or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from support.divergences import EVERYTHING, DivergenceProblem, kl
from support.fuzz.draw import Draw
from support.fuzz.head_cases import HeadCase, draw_backend, draw_head
from support.fuzz.hold import Held
from support.heads import HeadProblem
from trl_fast.ops import DivergenceLoss, linear_divergence_to_given
from trl_fast.ops.divergence.row_kernels import DIVERGENCE_KERNELS
from trl_fast.ops.head.row_kernels import ROW_KERNELS

# A KL is infinite where a token is ruled out on one side only.
SKEWED = (("skewed_forward_kl", 0.1), ("skewed_reverse_kl", 0.1))
MIXTURES = (("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9), *SKEWED)
# Its gradient jumps where both have the same probability.
DISTANCES = (("tvd", 0.0),)
KLS = (("jsd", 0.0), ("jsd", 1.0))


def _teacher_of(draw: Draw, student: HeadProblem) -> HeadProblem:
    """Draws a teacher of as many rows and words: near the student, or far from it."""
    n, v, h = len(student.targets), len(student.weight), draw.choose("teacher_h", 1, 8, 40)
    dtype = student.hidden.dtype
    if draw.chance("near", 0.3):
        step = draw.choose("step", 0.0, 1e-3, 0.1)
        hidden = student.hidden.detach() + (step * draw.normal(*student.hidden.shape)).to(dtype)
        return replace(student, hidden=hidden, weight=student.weight.detach())
    size = draw.choose("teacher_size", 0.1, 1.0, 8.0)
    hidden, weight = draw.normal(n, h) * size / math.sqrt(h), draw.normal(v, h)
    bias = draw.normal(v).to(dtype) if draw.chance("teacher_bias", 0.3) else None
    numbers = {"temperature": student.temperature}
    if draw.chance("teacher_softcap", 0.2):
        numbers["softcap"] = 5.0
    hidden, weight = draw.laid_out("teacher_hidden", hidden.to(dtype)), weight.to(dtype)
    return HeadProblem(hidden, weight, bias, student.targets, **numbers)


@dataclass
class GivenProblem(DivergenceProblem):
    """Gives the log-probabilities of the teacher's likeliest tokens in the place of its head."""

    def run(self, outputs: tuple[str, ...] = EVERYTHING, **named: object) -> DivergenceLoss:
        """Runs the op."""
        logprobs, ids = self.distributions(torch.float64)[1].topk(self.more["top_k"])
        given = {name: value for name, value in self.arguments.items() if name != "top_k" and "teacher" not in name}
        return linear_divergence_to_given(
            self.student.hidden, self.student.weight, logprobs, ids, outputs=outputs, **given, **named
        )


def try_divergence(draw: Draw, held: Held) -> None:
    """Tries it on random heads."""
    case = draw_head(draw, draw_backend(draw))
    student = case.problem
    n, v = len(student.targets), len(student.weight)
    teacher = _teacher_of(draw, student)
    other = HeadCase(teacher, case.backend, case.product)
    ruled_out = not case.logits.isfinite().all()
    kinds = *MIXTURES, *(() if "near" in draw.said else DISTANCES), *(() if ruled_out else KLS)
    kind, beta = draw.choose("kind", *kinds)
    weights = (draw.uniform(n) + 0.1) * (draw.uniform(n) < 0.7) if draw.chance("weights", 0.6) else None
    problem = DivergenceProblem(student, teacher, weights, kind, beta)
    if draw.chance("top_k", 0.3) and not ruled_out:
        problem.more |= {"top_k": min(v, draw.choose("top_k", 1, 4, 2200)), "tail": draw.choose("tail", True, False)}
        if draw.chance("of_student", 0.3):
            problem.more["top_k_of"] = "student"
        elif draw.chance("given", 0.5):
            problem = GivenProblem(**vars(problem))
    if draw.chance("small_workspace", 0.5):
        kernels = (DIVERGENCE_KERNELS[case.backend], ROW_KERNELS[case.backend])
        logit = 2 * case.product.itemsize + max(kernel.bytes_per_element for kernel in kernels)
        problem.more["workspace_bytes"] = v * logit * draw.choose("rows", 1, 3)
    if not n:
        held.same("loss", problem.run(backend=case.backend).loss.detach().float(), torch.zeros(()))
        return
    _hold(held, case, other, problem)


def _hold(held: Held, case: HeadCase, other: HeadCase, problem: DivergenceProblem) -> None:
    """Holds the results; other: the teacher's head."""
    counts = torch.ones(len(case.logits)) if problem.weights is None else (problem.weights != 0).float()
    factor = counts.double() if problem.weights is None else problem.weights.double()
    got = problem.run(EVERYTHING, backend=case.backend)
    leaves = list(case.leaves.values())
    trains = [name for name in ("hidden", "weight", "bias") if name in case.leaves]
    exact, plain = problem.answer(torch.float64, leaves), problem.answer(case.product, leaves)
    logp_s, logp_t = (x.detach() for x in problem.distributions(torch.float64))
    sizes = (case.logit_size() + other.logit_size())[:, 0]
    distance = torch.where(logp_s == logp_t, 0.0, (logp_s - logp_t).abs()).clamp(max=100)
    p, q = logp_s.exp(), logp_t.exp()
    unit = ((1 + (torch.maximum(p, q) * distance).sum(1)) * sizes).clamp(min=1)
    floor = 8 * case.score_floor()
    held.close("divergence", got.scores.divergence, plain.divergence * counts, exact.divergence * counts, unit, floor)
    entropy_unit = exact.entropy.clamp(min=1) * sizes
    held.close("entropy", got.scores.entropy, plain.entropy * counts, exact.entropy * counts, entropy_unit, floor)
    losses = [torch.where(factor == 0, 0.0, factor * one.divergence).sum() for one in (plain, exact)]
    held.close("loss", got.loss, *losses, (factor * unit).sum(), floor)
    if not leaves:
        return
    spread = 1 + distance + kl(logp_s, logp_t).clamp(max=100)[:, None].nan_to_num(100.0)
    flat = factor[:, None] * (p * spread + q) * sizes[:, None] * case.steepness + 1e-29
    hidden, weight = (x.detach().double().abs() for x in (case.problem.hidden, case.problem.weight))
    units = {"hidden": flat @ weight, "weight": flat.t() @ hidden, "bias": flat.sum(0)}
    floors = case.gradient_floors()
    ours = torch.autograd.grad(got.loss, leaves)
    for name, leaf, a, b, c in zip(trains, leaves, ours, plain.gradients, exact.gradients, strict=True):
        held.close(f"gradient of {name}", a, b, c, units[name], floors[name], torch.finfo(leaf.dtype).tiny)
