"""Transforms logits, packs them and adds them to online sums, for every kernel that has logits.

The sums are those of the state in `trl_fast/ops/head/row_statistics.py`, over all classes but the row's target: six
float32 vectors (R,), one entry a row, in the order top, sum, sum_x, sum_sq, total, before. Which of them are kept up
follows from OUTPUTS, the mask of trl_fast/ops/token_scores.py.
"""

import triton
import triton.language as tl

from . import shared_constants

# Flags come first in `FLAG & OUTPUTS`: in the interpreter, OUTPUTS is an int, which knows no constexpr.
ENTROPY = tl.constexpr(shared_constants.ENTROPY)
LOG_SUM_SQ_PROBS = tl.constexpr(shared_constants.LOG_SUM_SQ_PROBS)
MEAN_LOGITS = tl.constexpr(shared_constants.MEAN_LOGITS)
IS_TOP1 = tl.constexpr(shared_constants.IS_TOP1)

# Rows of the state.
SUM, SUM_X = tl.constexpr(shared_constants.SUM), tl.constexpr(shared_constants.SUM_X)
SUM_SQ, TOTAL = tl.constexpr(shared_constants.SUM_SQ), tl.constexpr(shared_constants.TOTAL)
TARGET, BEFORE = tl.constexpr(shared_constants.TARGET), tl.constexpr(shared_constants.BEFORE)

# The format of packed logits.
STEPS_A_NAT = tl.constexpr(float(shared_constants.PACKED_STEPS_A_NAT))
LOWEST_CODE = tl.constexpr(float(shared_constants.PACKED_LOWEST_CODE))
MINUS_INF_WORD = tl.constexpr(shared_constants.PACKED_MINUS_INF_CODE)
MINUS_INF_CODE = tl.constexpr(float(shared_constants.PACKED_MINUS_INF_CODE))


@triton.jit
def _tanh(x):
    """Returns tanh(x) and its derivative.

    Near 0, where 1 − d with d = 2 / (e^2|x| + 1) cancels, a polynomial (Cephes tanhf). Elsewhere the derivative
    1 − tanh² would cancel: it is d·(2 − d).
    """
    magnitude = tl.abs(x)
    z = x * x
    p = 0.133314422036 + z * (-0.0537397155531 + z * (0.0206390887954 + z * -0.00570498872745))
    near = x + x * z * (-0.333332819422 + z * p)
    distance = 2.0 / (tl.exp(2.0 * tl.minimum(magnitude, 40.0)) + 1.0)
    far = tl.where(x < 0.0, distance - 1.0, 1.0 - distance)
    is_far = magnitude >= 0.625  # not of NaN, which stays
    return tl.where(is_far, far, near), tl.where(is_far, distance * (2.0 - distance), 1.0 - near * near)


@triton.jit
def transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """Returns u and du/dz of raw logits z, to which the bias has been added."""
    y = z * scale
    derivative = scale * inv_temperature
    if HAS_SOFTCAP:
        tanh, tanh_derivative = _tanh(y / softcap)
        y = softcap * tanh
        derivative = derivative * tanh_derivative
    return y * inv_temperature, derivative


@triton.jit
def packed_words(u, top):
    """Packs logits u (R, C), whose largest are top (R,), into words (R, C) int16; kept_logits.py has the format."""
    steps = (top[:, None] - u) * STEPS_A_NAT
    limit = tl.where(steps < float("inf"), LOWEST_CODE, MINUS_INF_CODE)  # NaN is not below
    code = tl.where(steps < limit, steps, limit)
    # A float of [2²³, 2²⁴) has its integer in the low bits: adding 2²³ rounds to it.
    return (code + 8388608.0).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def add_logits(sums, u, mask, from_target, OUTPUTS: tl.constexpr):
    """Adds logits u (R, C), -inf where `mask` is false, to the sums; returns these, and u with -inf for targets.

    from_target: (R, C) integer, columns from the target, negative to the left of it.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    top, s, sum_x, sum_sq, total, before = sums
    others = tl.where(from_target == 0, -float("inf"), u)
    new_top = tl.maximum(top, tl.max(others, 1))
    # While everything is -inf, subtract 0: -inf - -inf would be NaN.
    anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
    shift = tl.where(top == -float("inf"), 0.0, top - anchor)
    factor = tl.exp2(shift * LOG2E)
    x = others - anchor[:, None]
    e = tl.exp2(x * LOG2E)
    if ENTROPY & OUTPUTS:
        sum_x = factor * (sum_x + shift * s) + tl.sum(tl.where(e == 0.0, 0.0, e * x), 1)
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        sum_sq = factor * factor * sum_sq + tl.sum(e * e, 1)
    if MEAN_LOGITS & OUTPUTS:
        total += tl.sum(tl.where(mask, u, 0.0), 1)
    if IS_TOP1 & OUTPUTS:
        before = tl.maximum(before, tl.max(tl.where(from_target < 0, u, -float("inf")), 1))
    s = factor * s + tl.sum(e, 1)
    return (new_top, s, sum_x, sum_sq, total, before), others


@triton.jit
def store_sums(state, stride, sums, mask, OUTPUTS: tl.constexpr):
    """Writes the sums to their rows of a state, `stride` apart; the others stay as they are."""
    top, s, sum_x, sum_sq, total, before = sums
    tl.store(state, top, mask=mask)
    tl.store(state + stride * SUM, s, mask=mask)
    if ENTROPY & OUTPUTS:
        tl.store(state + stride * SUM_X, sum_x, mask=mask)
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        tl.store(state + stride * SUM_SQ, sum_sq, mask=mask)
    if MEAN_LOGITS & OUTPUTS:
        tl.store(state + stride * TOTAL, total, mask=mask)
    if IS_TOP1 & OUTPUTS:
        tl.store(state + stride * BEFORE, before, mask=mask)
