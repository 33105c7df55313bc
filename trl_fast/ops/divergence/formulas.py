"""Names the divergences and holds their arithmetic for one token of the vocabulary.

With student s, teacher t, the mixture m = (1 − w) s + w t, and KL(p‖q) = Σ p log(p/q), all but total variation are

    D = A · KL(t‖m) + B · KL(s‖m)

| kind | A | B | w | source |
|---|---|---|---|---|
| jsd, 0 < β < 1 | β | 1 − β | β | generalised Jensen-Shannon (Agarwal et al., arXiv 2306.13649) |
| jsd, β = 0: forward KL(t‖s) | 1 | 0 | 0 | its limit, divided by β |
| jsd, β = 1: reverse KL(s‖t) | 0 | 1 | 1 | its limit, divided by 1 − β |
| skewed_forward_kl: KL(t‖βt + (1 − β)s) | 1 | 0 | β | DistiLLM (Ko et al., arXiv 2402.03898), α = β |
| skewed_reverse_kl: KL(s‖(1 − β)t + βs) | 0 | 1 | 1 − β | the same |
| tvd: ½ Σ abs(s − t) | – | – | – | total variation (Wen et al., arXiv 2307.15190) |

Each D = Σ f(s, t) has the gradient s (f' − Σ s f') by the student's logits, f' being the derivative by s. Two things
keep small divergences exact: KL(p‖q) is summed as Σ p (log(p/q) − 1 + q/p), whose terms are never negative and do not
cancel; and s − t is taken from d = log t − log s where d is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KINDS = ("jsd", "skewed_forward_kl", "skewed_reverse_kl", "tvd")


class DivergenceFormula(NamedTuple):
    """Holds the numbers of the table above: `teacher` A, `student` B, `mixture` w; `is_tvd` for total variation."""

    teacher: float
    student: float
    mixture: float
    is_tvd: bool = False

    @classmethod
    def of(cls, kind: str, beta: float) -> DivergenceFormula:
        """Returns the formula of a user's kind and beta.

        Raises:
            ValueError: the kind is unknown, beta is outside [0, 1], or it makes a skewed divergence zero.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: unknown divergence {kind!r}; expected one of {', '.join(KINDS)}")
        if not isinstance(beta, (int, float)) or not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {beta!r}")
        beta = float(beta)
        if kind == "tvd":
            return cls(0.0, 0.0, 0.0, is_tvd=True)
        if kind != "jsd" and beta == 1.0:
            raise ValueError(f"beta=1 makes {kind} zero: it is the share that both sides have; DistiLLM takes 0.1")
        if kind == "skewed_forward_kl" or beta == 0.0 and kind == "jsd":
            return cls(1.0, 0.0, beta)
        if kind == "skewed_reverse_kl" or beta == 1.0:
            return cls(0.0, 1.0, 1.0 if kind == "jsd" else 1.0 - beta)
        return cls(beta, 1.0 - beta, beta)

    @property
    def tilt(self) -> float:
        """Returns A (1 − w) − B w, with which f' has (s − t) / m; zero for jsd."""
        return self.teacher * (1 - self.mixture) - self.student * self.mixture


def divergence_terms(
    logp_s: torch.Tensor, logp_t: torch.Tensor, formula: DivergenceFormula
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes each token's term of the divergence, and its rise s · (f' − what f' is where t = s).

    logp_s, logp_t: log-probabilities of any one shape, float32|float64; −inf is a token that is ruled out.
    """
    p_s, p_t = logp_s.exp(), logp_t.exp()
    d = torch.where(logp_s == logp_t, 0.0, logp_t - logp_s)
    # s − t, exactly where they are close
    difference = torch.where(d.abs() < 0.5, -p_s * torch.expm1(d.clamp(-1, 1)), p_s - p_t)
    if formula.is_tvd:
        return 0.5 * difference.abs(), 0.5 * p_s * difference.sign()
    if formula.mixture == 0.0:
        return _kl_term(p_t, p_s, d), difference
    if formula.mixture == 1.0:
        return _kl_term(p_s, p_t, -d), torch.where(p_s == 0, 0.0, -p_s * d)
    w, falls = formula.mixture, d <= 0
    # The larger of s and t lies closer to m: its log-ratio to m, then the other's. m by that one is
    # 1 − share + share e^−abs(d).
    share = torch.full_like(d, 1 - w).masked_fill_(falls, w)
    rest = torch.full_like(d, w).masked_fill_(falls, 1 - w)
    distance = d.abs()
    small = torch.log1p(share * torch.expm1(-distance))
    near = -torch.where(distance < 0.5, small, torch.log(rest + share * torch.exp(-distance)))
    ratio_s, ratio_t = torch.where(falls, near, near - d), torch.where(falls, near + d, near)
    m = (1 - w) * p_s + w * p_t
    value = torch.zeros_like(m)
    for part, p, ratio in ((formula.teacher, p_t, ratio_t), (formula.student, p_s, ratio_s)):
        if part:
            value = value + part * _kl_term(p, m, ratio)
    rise = torch.where(p_s == 0, 0.0, formula.student * p_s * ratio_s)
    if formula.tilt:
        # A product of two probabilities may be below float32's range.
        curve = formula.tilt * difference * ((1 - w) * p_s / m)
        rise = rise + torch.where(m == 0, 0.0, curve)
    return value, rise


def far_rise(logp_s: torch.Tensor, logp_t: torch.Tensor, formula: DivergenceFormula) -> torch.Tensor:
    """Computes s (f' − what f' is where t is 0), for a mixture; log-probabilities and result have any one shape.

    It is less than the rise of `divergence_terms`, which is 0 where t = s, for rows whose s and t have little in
    common. Of such a row nothing would be left of the other, less its mean.
    """
    p_s, p_t, w = logp_s.exp(), logp_t.exp(), formula.mixture
    m = (1 - w) * p_s + w * p_t
    t = torch.where(m == 0, 0.0, p_t / m)
    few = torch.where(m == 0, 1.0, (1 - w) * p_s / m)
    log_rest = torch.where(w * t < 0.5, torch.log1p(-w * t), few.log())
    return torch.where(p_s == 0, 0.0, p_s * (formula.student * log_rest - formula.tilt * t))


def _kl_term(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Computes p log_ratio − p + q of a token's probabilities p and q, log_ratio being log(p/q)."""
    # p (e^−x − 1 + x) by its series where x is small: to the last bit of float32, and of float64
    limit = 2.0**-7 if p.dtype == torch.float64 else 0.5
    x = log_ratio.clamp(-limit, limit)
    near = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x / 40320))))))
    far = p * log_ratio - p + q
    return torch.where(p == 0, q, torch.where(log_ratio.abs() < limit, p * near, far))
