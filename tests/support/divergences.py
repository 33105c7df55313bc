"""Two heads to compare, with the float64 answer and what plain PyTorch gives in the same dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from support.heads import HeadProblem, make_problem
from trl_fast.ops import linear_divergence

# Kinds with a beta each: all formulas, and those of a row kernel of their own.
KINDS = (
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("jsd", 0.3),
    ("skewed_forward_kl", 0.1),
    ("skewed_reverse_kl", 0.1),
    ("tvd", 0.5),
)
EVERYTHING = ("divergence", "entropy", "is_same_top1")


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) (R,) of log-probabilities (R, V)."""
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)


def row_divergences(kind: str, beta: float, logp_s: torch.Tensor, logp_t: torch.Tensor) -> torch.Tensor:
    """The divergences (R,) of log-probabilities (R, V), as the papers write them."""
    if kind == "tvd":
        return 0.5 * (logp_s.exp() - logp_t.exp()).abs().sum(-1)
    shares = {"jsd": beta, "skewed_forward_kl": beta, "skewed_reverse_kl": 1 - beta}
    share = shares[kind]
    if share == 0:
        return kl(logp_t, logp_s)
    if share == 1:
        return kl(logp_s, logp_t)
    mixture = torch.logaddexp(logp_s + math.log1p(-share), logp_t + math.log(share))
    if kind == "skewed_forward_kl":
        return kl(logp_t, mixture)
    if kind == "skewed_reverse_kl":
        return kl(logp_s, mixture)
    return beta * kl(logp_t, mixture) + (1 - beta) * kl(logp_s, mixture)


class Answer(NamedTuple):
    """divergence, entropy, is_same_top1 (N,), and the gradients of the student's hidden, weight, bias by the loss."""

    divergence: torch.Tensor
    entropy: torch.Tensor
    is_same_top1: torch.Tensor
    gradients: list[torch.Tensor]


@dataclass
class DivergenceProblem:
    """A student's and a teacher's head of N rows, and how they are compared."""

    student: HeadProblem
    teacher: HeadProblem
    weights: torch.Tensor | None = None
    kind: str = "jsd"
    beta: float = 0.3
    more: dict = field(default_factory=dict)

    @property
    def arguments(self) -> dict:
        s, t = self.student, self.teacher
        return {
            **{"weights": self.weights, "kind": self.kind, "beta": self.beta, "temperature": s.temperature},
            **{"bias": s.bias, "softcap": s.softcap, "logit_scale": s.logit_scale},
            **{"teacher_bias": t.bias, "teacher_softcap": t.softcap, "teacher_logit_scale": t.logit_scale},
            **self.more,
        }

    def run(self, outputs: tuple[str, ...] = EVERYTHING, **named: object):
        """Runs the op."""
        s, t = self.student, self.teacher
        return linear_divergence(s.hidden, s.weight, t.hidden, t.weight, outputs=outputs, **self.arguments, **named)

    def distributions(self, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides' log-probabilities (N, V) by PyTorch, of what is compared."""
        columns = slice(self.more.get("vocab_size"))
        logits_s, logits_t = self.student.logits(dtype)[:, columns], self.teacher.logits(dtype)[:, columns].detach()
        # A probability of 0 has a logarithm, so that autograd does not make it NaN.
        return logits_s.log_softmax(-1).clamp(min=-1e30), logits_t.log_softmax(-1).clamp(min=-1e30)

    def answer(self, dtype: torch.dtype | None = None, leaves: list[torch.Tensor] | None = None) -> Answer:
        """By PyTorch with products in `dtype` (None: the tensors' own); leaves: of the gradients; None: all."""
        logp_s, logp_t = self.distributions(dtype)
        entropy = kl(logp_s, torch.zeros_like(logp_s)).neg()
        same = logp_s.gather(1, logp_t.argmax(-1, keepdim=True)).squeeze(1) >= logp_s.amax(-1)
        top_k = self.more.get("top_k")
        if top_k:
            logp_s, logp_t = self.narrowed(logp_s, logp_t, top_k)
        divergence = row_divergences(self.kind, self.beta, logp_s, logp_t)
        weights = torch.ones_like(divergence) if self.weights is None else self.weights.to(divergence.dtype)
        loss = torch.where(weights == 0, 0.0, divergence * weights).sum()
        leaves = self.student.leaves if leaves is None else leaves
        gradients = list(torch.autograd.grad(loss, leaves, allow_unused=True)) if leaves else []
        return Answer(divergence.detach(), entropy.detach(), same, gradients)

    def narrowed(self, logp_s: torch.Tensor, logp_t: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens of a side, and the tail as one more class unless it is not asked for."""
        of_student = self.more.get("top_k_of") == "student"
        ids = (logp_s if of_student else logp_t).topk(top_k, dim=-1).indices
        rest = torch.ones_like(logp_t, dtype=torch.bool).scatter(1, ids, False)
        has_tail = self.more.get("tail", True) and top_k < logp_t.shape[1]
        tails = [x.masked_fill(~rest, -math.inf).logsumexp(-1, keepdim=True) for x in (logp_s, logp_t)] * has_tail
        found = [torch.cat([x.gather(1, ids), *tails[i : i + 1]], 1) for i, x in enumerate((logp_s, logp_t))]
        return found[0].log_softmax(-1), found[1].log_softmax(-1)


def make_divergence(
    n: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "jsd",
    beta: float = 0.3,
    bias: bool = False,
    offset: float = 0.0,
    transforms: bool = False,
    weights: bool = True,
    **more: object,
) -> DivergenceProblem:
    """A problem of random heads, the teacher wider. transforms: with scales, caps and a temperature."""
    both = ({"logit_scale": 0.7, "softcap": 9.0}, {"logit_scale": -1.2, "softcap": 7.0}) if transforms else ({}, {})
    temperature = 1.3 if transforms else 1.0
    common = {"dtype": dtype, "bias": bias, "offset": offset, "temperature": temperature}
    student = make_problem(n, v, 24, seed=1, spread=0.4, **common, **both[0])
    teacher = make_problem(n, v, 32, seed=2, spread=0.4, **common, **both[1])
    factors = torch.rand(n, generator=torch.Generator().manual_seed(3)) + 0.1 if weights else None
    if factors is not None and n > 2:
        factors[n // 2] = 0.0
    return DivergenceProblem(student, teacher, factors, kind, beta, more)
