"""Specifies the row kernel of divergences by its PyTorch reference, and holds the table of its implementations.

`row_divergence` does the row work of `linear_divergence`: whole rows of both heads' raw products in; three results a
row out; and the gradient by the student's raw product, which may take its place. Its signature, for all backends:

    row_divergence(
        student, student_bias, student_scale, student_softcap,
        teacher, teacher_bias, teacher_scale, teacher_softcap,
        inv_temperature, teacher_part, student_part, mixture, is_tvd,
        weights, results, gradient)

The numbers teacher_part, student_part, mixture, is_tvd are those of `DivergenceFormula`, in this order; formulas.py
has the arithmetic. Scale, softcap and inv_temperature are those of LogitTransform; a softcap of 0 means none.

Rows of student, teacher, results and gradient are contiguous, but strided. The gradient may be the very memory of the
student's products, and the teacher's may serve as scratch. On a GPU, float32 logits may have a bfloat16 or float16
gradient, which may lie in the first half of each of their rows: `student.view(dtype)[:, :V]`. A row of weight 0 has
the gradient 0, whatever its logits are. A logit of −inf rules a token out: nothing is NaN for it where the divergence
is finite. Where it is infinite, its row's gradient is not defined.

Three sweeps over a row do: largest logits, sums; the terms of divergence, rise, entropy; the gradient. The largest
logit's 1 is best kept apart from a row's sum (log1p(others)): then a row of which both heads are sure is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..device import device_facts
from ..head.logit_transform import LogitTransform
from .formulas import DivergenceFormula, divergence_terms, far_rise

# Rows of the results (3, R).
DIVERGENCE_ROW, ENTROPY_ROW, IS_SAME_TOP1_ROW = range(3)
NUM_RESULTS = 3


class DivergenceKernel(NamedTuple):
    """Holds one implementation of the row kernel; the signature is that of the reference below.

    bytes_per_element: of temporaries beyond both logits of a token, for which the workspace has to leave room.
    """

    divergence: Callable[..., None]
    bytes_per_element: int


def num_sweeps(mixture: float, is_tvd: bool, with_gradient: bool) -> int:
    """Returns how often a GPU's kernel reads both logits; mixture, is_tvd: of DivergenceFormula.

    A plain KL knows its rises' mean after the first sweep, and takes its terms with the gradient.
    """
    return 2 if not with_gradient or (mixture in (0.0, 1.0) and not is_tvd) else 3


def row_divergence_reference(
    student: torch.Tensor,
    student_bias: torch.Tensor | None,
    student_scale: float,
    student_softcap: float,
    teacher: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    teacher_scale: float,
    teacher_softcap: float,
    inv_temperature: float,
    teacher_part: float,
    student_part: float,
    mixture: float,
    is_tvd: bool,
    weights: torch.Tensor,
    results: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Computes the divergence of R rows, and its gradient by the student's raw product; the module says more.

    Args:
        student, teacher: (R, V) float32|bfloat16|float16 each (float64 gives the float64 reference), raw products.
        student_bias, teacher_bias: (V,) any float dtype, or None.
        weights: (R,) float32 (float64 for float64 rows), factors of the rows' gradients; the results have none.
        results: (3, R) float32 (float64 for float64 rows): the divergence; the student's entropy; 1.0 where no token
            is more likely for the student than the teacher's first most likely one.
        gradient: (R, V) of the student's dtype, or None if there is none to compute.
    """
    formula = DivergenceFormula(teacher_part, student_part, mixture, is_tvd)
    transform = LogitTransform(student_scale, student_softcap, inv_temperature)
    u_s, cap_derivative = transform.apply(student, student_bias)
    u_t, _ = LogitTransform(teacher_scale, teacher_softcap, inv_temperature).apply(teacher, teacher_bias)
    logp_s, logp_t = log_softmax(u_s), log_softmax(u_t)
    value, rise = divergence_terms(logp_s, logp_t, formula)
    p = logp_s.exp()
    results[DIVERGENCE_ROW] = value.sum(dim=1)
    results[ENTROPY_ROW] = -torch.where(p > 0, p * logp_s, p).sum(dim=1)
    if u_s.numel():
        top = u_s.gather(1, u_t.argmax(dim=1, keepdim=True)).squeeze(1)
        results[IS_SAME_TOP1_ROW] = (top >= u_s.amax(dim=1)).to(results.dtype)
    if gradient is not None:
        du = _centred(rise, logp_s, logp_t, formula)
        du = du * (weights[:, None].to(p.dtype) * student_scale * inv_temperature)
        if cap_derivative is not None:
            du *= cap_derivative
        gradient.copy_(torch.where(weights[:, None] == 0, 0.0, du))


def _centred(
    rise: torch.Tensor, logp_s: torch.Tensor, logp_t: torch.Tensor, formula: DivergenceFormula
) -> torch.Tensor:
    """Returns the derivative of the rows' divergences by the student's logits, all (R, V): s (f' − its mean)."""
    if formula.mixture == 0.0 and not formula.is_tvd:
        return rise  # whose sum is 1 − 1
    p, mean = logp_s.exp(), rise.sum(dim=1, keepdim=True)
    if not formula.tilt or formula.mixture == 1.0:
        return rise - p * mean
    far = far_rise(logp_s, logp_t, formula)
    far_mean = far.sum(dim=1, keepdim=True)
    return torch.where(far_mean.abs() < mean.abs(), far - p * far_mean, rise - p * mean)


def log_softmax(u: torch.Tensor) -> torch.Tensor:
    """Computes log-probabilities (R, V) of logits (R, V), exact for rows with one likely token too."""
    if u.numel() == 0:
        return u
    top, place = u.max(dim=1, keepdim=True)
    x = u - top
    others = x.exp().scatter_(1, place, 0.0).sum(dim=1, keepdim=True)
    # The largest logit has 1 of the sum; where it is no number, neither is the row.
    return x - torch.log1p(others) + torch.where(top.abs() < float("inf"), 0.0, float("nan"))


def _compiled(*args: object) -> None:
    torch.ops.trl_fast.row_divergence(*args)


def _triton(*args: object) -> None:
    from trl_fast.kernels.divergence_kernels import row_divergence

    row_divergence(*args)


# The reference has up to 20 temporaries alive at once.
DIVERGENCE_KERNELS = {
    "torch": DivergenceKernel(row_divergence_reference, 80),
    "cpp": DivergenceKernel(_compiled, 0),
    "cuda": DivergenceKernel(_compiled, 0),
    "triton": DivergenceKernel(_triton, 0),
}


def divergence_kernel(backend: str, device: torch.device) -> DivergenceKernel:
    """Returns a backend's kernel, or the one that stands in for it on a simulated device."""
    return device_facts(device).divergence_kernel or DIVERGENCE_KERNELS[backend]
