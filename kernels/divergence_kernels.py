"""Computes the divergences of rows of two heads' logits, and their gradient, in Triton.

`trl_fast/ops/divergence/row_kernels.py` specifies the kernel and explains the names. One program works on one row, in
sweeps over both heads' logits: largest logits and sums; the terms of the divergence and their rises (formulas.py); the
gradient. Of a Kullback-Leibler divergence of the two heads alone, the mean rise is known after the first sweep: then
the last two are one.

Row offsets are 64-bit, sums are float32. Largest logits are numbers of the row, sums have an entry a column of a
block, so that only the largest logits cost a reduction in each trip. The largest logit's own 1 is not in a sum: a row
of which a head is sure stays exact. As in row_kernels.py, only flags and the block size are compile-time constants,
and configurations are fixed.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device
from .online_softmax import transformed

BLOCK, NUM_WARPS = 2048, 8
# Left alone, NVIDIA's assembler spills a few registers of a thread to fit one more block into a multiprocessor. AMD's
# knows no such option.
MAX_REGISTERS = 128
KINDS = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tvd")
# Those whose gradient needs no sums beyond the first sweep's.
TWO_SWEEPS = ("forward_kl", "reverse_kl")

_ANY_VALUE = [
    *(f"{head}_{name}" for head in ("student", "teacher") for name in ("scale", "softcap")),
    *("inv_temperature", "p_share", "q_share", "weights", "results", "results_stride"),
]
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log1p(x):
    """Returns log(1 + x) of x ≥ 0 to an ulp or two: the hardware's logarithm is several times as far off.

    1 + x = 2^e·m with m in [2/3, 4/3), and log m = 2·artanh((m − 1) / (m + 1)); then what 1 + x was rounded by.
    """
    rounded = 1.0 + x
    bits = rounded.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9))))
    log_m = 2.0 * (s + s * series)
    return exponent.to(tl.float32) * 0.6931471805599453 + (log_m + (x - (rounded - 1.0)) / rounded)


@triton.jit
def _load_logits(head, columns, mask, inv_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Returns a row's logits u at some columns, -inf where `mask` is false, and du/dz.

    head: the row of raw logits, the bias, scale and softcap.
    """
    row, bias, scale, softcap = head
    z = tl.load(row + columns, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    u, derivative = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    return tl.where(mask, u, -float("inf")), derivative


@triton.jit
def _moment(e, x):
    return tl.where(e == 0.0, 0.0, e * x)


@triton.jit
def _add_block(top, first, others, past, u, columns):
    """Adds a block of logits u to a head's sums.

    top: the largest logit so far; first: its first column; others: Σ e^(u − top) of other logits, an entry a column of
    a block; past: the same of those that were the largest before. Returns these four; the block's u − top and
    e^(u − top); how much exponents fell by, and the factor that goes with it; 1 if there was a largest logit before.
    """
    block_top, place = tl.max(u, 0, return_indices=True)
    grows = block_top > top
    seen = tl.where(top == -float("inf"), 0.0, 1.0)
    new_top = tl.where(grows, block_top, top)
    # While everything is -inf, subtract 0: -inf - -inf would be NaN.
    anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
    shift = tl.where(top == -float("inf"), 0.0, top - anchor)
    factor = tl.exp2(shift * _LOG2E)
    first = tl.where(grows, tl.min(columns, 0) + place, first)
    x = u - anchor
    e = tl.exp2(x * _LOG2E)
    others = factor * others + tl.where(columns == tl.where(grows, first, -1), 0.0, e)
    past = factor * past + tl.where(grows, factor * seen, 0.0)
    return new_top, first, others, past, x, e, shift, factor, seen


@triton.jit
def _log_sum(top, others):
    """Returns log Σ e^(u − top); NaN if the largest logit is no number."""
    return tl.where(tl.abs(top) < float("inf"), _log1p(others), float("nan"))


@triton.jit
def _class_terms(log_p, log_q, shares, KIND: tl.constexpr):
    """Returns p, a class's term of the divergence, and its rise; log_p: the student's, log_q: the teacher's.

    shares: those of p and q in the mixture. Everything comes from the larger of p and q and the ratio of the smaller
    to it. A term is x·(log(x/m) − 1 + m/x), which is never negative. With δ = 1 − ratio and ψ = −log ratio − δ by
    their series where these are small, nothing cancels in it.
    """
    top = tl.maximum(log_p, log_q)
    gap = tl.where(top == -float("inf"), 0.0, log_p - log_q)
    distance = tl.abs(gap)
    larger, ratio = tl.exp2(top * _LOG2E), tl.exp2(distance * -_LOG2E)
    p_is_smaller = gap < 0.0
    p = larger * tl.where(gap >= 0.0, 1.0, ratio)  # NaN is not above
    near = distance < 0.125
    series = distance * distance * (0.5 - distance * (1.0 / 6 - distance * (1.0 / 24 - distance * (1.0 / 120))))
    delta = tl.where(near, distance - series, 1.0 - ratio)
    psi = tl.where(near, series, distance - delta)
    # Of the one that is the smaller, if m is the larger. An infinite ψ would make NaN of a ratio of 0.
    of_smaller = larger * (delta * delta - ratio * tl.minimum(psi, 1e4))
    if KIND == "tvd":
        term = 0.5 * larger * delta
        rise = p * tl.where(p_is_smaller, -0.5, tl.where(gap == 0.0, 0.0, 0.5))
    elif KIND == "forward_kl":
        term = tl.where(p_is_smaller, _moment(larger, psi), of_smaller)
        rise = larger * tl.where(p_is_smaller, -delta, delta)
    elif KIND == "reverse_kl":
        term = tl.where(p_is_smaller, of_smaller, _moment(larger, psi))
        rise = _moment(p, gap)
    else:
        term, rise = _mixture_terms(p, larger, ratio, distance, p_is_smaller, delta, shares, KIND)
    return p, term, rise


@triton.jit
def _mixture_terms(p, larger, ratio, distance, p_is_smaller, delta, shares, KIND: tl.constexpr):
    """Returns a class's term and rise, of a mixture m of p and q with these shares; the rest is of _class_terms.

    With a and b the smaller's and the larger's share, m is the larger times 1 − aδ, the smaller times 1 + bδ/ratio.
    The larger's term is itself times −log(1 − y) − y, y = aδ, the smaller's itself times e − log(1 + e), e = bδ/ratio.
    Rises take logarithms as they are: the gradient's sweep needs no series.
    """
    p_share, q_share = shares
    a, b = tl.where(p_is_smaller, p_share, q_share), tl.where(p_is_smaller, q_share, p_share)
    m = b + a * ratio
    log_larger = -tl.log(m)
    log_smaller = log_larger - tl.minimum(distance, 1e4)
    log_p = tl.where(p_is_smaller, log_smaller, log_larger)
    difference = tl.where(p_is_smaller, ratio - 1.0, 1.0 - ratio) / m
    y, c = a * delta, b * delta
    e = c / ratio
    y_series = y * y * (1.0 / 2 + y * (1.0 / 3 + y * (1.0 / 4 + y * (1.0 / 5 + y * (1.0 / 6 + y * (1.0 / 7))))))
    e_series = c * e * (1.0 / 2 - e * (1.0 / 3 - e * (1.0 / 4 - e * (1.0 / 5 - e * (1.0 / 6 - e * (1.0 / 7))))))
    of_larger = tl.where(y < 0.125, y_series, log_larger - y)
    of_smaller = tl.where(c < 0.125 * ratio, e_series, c + ratio * log_smaller)
    if KIND == "jsd":
        # Their shares of the divergence are those of the mixture, too.
        term = larger * (b * of_larger + a * of_smaller)
        rise = p_share * p * log_p
    elif KIND == "skewed_forward_kl":
        term = larger * tl.where(p_is_smaller, of_larger, of_smaller)
        rise = p_share * p_share * p * difference
    else:
        tl.static_assert(KIND == "skewed_reverse_kl")
        term = larger * tl.where(p_is_smaller, of_smaller, of_larger)
        rise = p * (log_p - p_share * q_share * difference)
    return term, rise


@triton.jit
def _statistics(
    head_p,
    head_q,
    num_columns,
    inv_temperature,
    KIND: tl.constexpr,
    P_BIAS: tl.constexpr,
    P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr,
    Q_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns what to subtract from the logits of both heads for log p and log q: the largest one, then a logarithm;
    the entropy of p; whether it is largest where q is. And of a reverse KL q's logit where p has its largest one, and
    the mean rise relative to that: in a row of which p is sure, nothing else would be left."""
    top_p, past_p = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    first_p, others_p = tl.full([], 0, tl.int32), tl.zeros([BLOCK], tl.float32)
    top_q, past_q, first_q, others_q = top_p, past_p, first_p, others_p
    # Σ p x, and Σ p (x − v + v_top); of each, the share of logits that were the largest is apart as in the sums.
    moment, past_moment, cross, past_cross, v_top = others_p, past_p, others_p, past_p, past_p
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        u = _load_logits(head_p, columns, columns < num_columns, inv_temperature, P_BIAS, P_SOFTCAP)[0]
        v = _load_logits(head_q, columns, columns < num_columns, inv_temperature, Q_BIAS, Q_SOFTCAP)[0]
        before, past_before, before_top = others_p, past_p, top_p
        top_p, first_p, others_p, past_p, x, p, shift_p, factor_p, seen = _add_block(
            top_p, first_p, others_p, past_p, u, columns
        )
        top_q, first_q, others_q, past_q, _y, _q, _shift, _factor, _seen = _add_block(
            top_q, first_q, others_q, past_q, v, columns
        )
        moment = factor_p * (moment + shift_p * before) + _moment(p, x)
        past_moment = factor_p * (past_moment + shift_p * (past_before + seen))
        if KIND == "reverse_kl":
            shift = 0.0
            if top_p > before_top:
                v_before = v_top
                v_top = tl.sum(tl.where(columns == first_p, v, 0.0), 0)
                shift = tl.where(seen == 0.0, 0.0, shift_p - (v_before - v_top))
            # A difference that is infinite fades with its probability.
            cross = tl.where(factor_p == 0.0, 0.0, factor_p * (cross + shift * before)) + _moment(p, x - (v - v_top))
            past_cross = factor_p * (past_cross + shift * (past_before + seen))
    others = tl.sum(others_p, 0) + past_p
    log_sum_p, log_sum_q = _log_sum(top_p, others), _log_sum(top_q, tl.sum(others_q, 0) + past_q)
    entropy = log_sum_p - (tl.sum(moment, 0) + past_moment) / (1.0 + others)
    of_choice = _load_logits(head_p, first_q, first_q < num_columns, inv_temperature, P_BIAS, P_SOFTCAP)[0]
    # Rises of a forward KL are p − q, which add up to 0.
    mean = (tl.sum(cross, 0) + past_cross) / (1.0 + others)
    return (top_p, log_sum_p, top_q, log_sum_q), entropy, tl.where(of_choice >= top_p, 1.0, 0.0), v_top, mean


@triton.jit
def _sum_terms(
    head_p,
    head_q,
    normal,
    shares,
    num_columns,
    inv_temperature,
    KIND: tl.constexpr,
    P_BIAS: tl.constexpr,
    P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr,
    Q_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns the sums of the terms and of their rises, the first with an entry a column of a block.

    normal: what is subtracted from logits, as _statistics returns it.
    """
    top_p, log_sum_p, top_q, log_sum_q = normal
    divergence, rises = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        u = _load_logits(head_p, columns, columns < num_columns, inv_temperature, P_BIAS, P_SOFTCAP)[0]
        v = _load_logits(head_q, columns, columns < num_columns, inv_temperature, Q_BIAS, Q_SOFTCAP)[0]
        p, term, rise = _class_terms(u - top_p - log_sum_p, v - top_q - log_sum_q, shares, KIND)
        divergence += term
        rises += rise
    return divergence, tl.sum(rises, 0)


@triton.jit
def _write_gradient(
    head_p,
    head_q,
    normal,
    v_top,
    mean,
    shares,
    num_columns,
    inv_temperature,
    weight,
    gradient,
    KIND: tl.constexpr,
    IS_NARROW: tl.constexpr,
    P_BIAS: tl.constexpr,
    P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr,
    Q_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a row's gradient, and returns the sums of the terms as _sum_terms does.

    v_top, mean: of a reverse KL as _statistics returns them, mean of others as _sum_terms does.
    """
    top_p, log_sum_p, top_q, log_sum_q = normal
    divergence = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        u, du = _load_logits(head_p, columns, columns < num_columns, inv_temperature, P_BIAS, P_SOFTCAP)
        v = _load_logits(head_q, columns, columns < num_columns, inv_temperature, Q_BIAS, Q_SOFTCAP)[0]
        p, term, rise = _class_terms(u - top_p - log_sum_p, v - top_q - log_sum_q, shares, KIND)
        divergence += term
        if KIND == "reverse_kl":
            change = _moment(p, (u - top_p) - (v - v_top) - mean)
        else:
            change = rise - p * mean
        grad = tl.where(weight == 0.0, 0.0, weight * du * change)
        # A narrower gradient may lie in the first half of the row: all of this block's logits have to be read.
        if IS_NARROW:
            tl.debug_barrier()
        tl.store(gradient + columns, grad.to(gradient.dtype.element_ty), mask=columns < num_columns)
    return divergence


@triton.jit(do_not_specialize=_ANY_VALUE)
def row_divergence_kernel(
    student,
    student_stride,
    student_bias,
    student_scale,
    student_softcap,
    teacher,
    teacher_stride,
    teacher_bias,
    teacher_scale,
    teacher_softcap,
    num_columns,
    inv_temperature,
    p_share,
    q_share,
    weights,
    results,
    results_stride,
    gradient,
    gradient_stride,
    KIND: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    P_BIAS: tl.constexpr,
    P_SOFTCAP: tl.constexpr,
    Q_BIAS: tl.constexpr,
    Q_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one row's results, and its gradient if there is room for one; p is the student's, q the teacher's."""
    index = tl.program_id(0).to(tl.int64)
    head_p = (student + index * student_stride, student_bias, student_scale, student_softcap)
    head_q = (teacher + index * teacher_stride, teacher_bias, teacher_scale, teacher_softcap)
    normal, entropy, is_same_top1, v_top, mean = _statistics(
        head_p, head_q, num_columns, inv_temperature, KIND, P_BIAS, P_SOFTCAP, Q_BIAS, Q_SOFTCAP, BLOCK
    )
    tl.store(results + index + results_stride, entropy)
    tl.store(results + index + 2 * results_stride, is_same_top1)
    tl.debug_barrier()  # a gradient may take the place of what was read last
    divergence = tl.zeros([BLOCK], tl.float32)
    shares = (p_share, q_share)
    if not (KIND == "forward_kl" or KIND == "reverse_kl") or not HAS_GRADIENT:
        divergence, mean = _sum_terms(
            head_p, head_q, normal, shares, num_columns, inv_temperature,
            KIND, P_BIAS, P_SOFTCAP, Q_BIAS, Q_SOFTCAP, BLOCK,
        )  # fmt: skip
    if HAS_GRADIENT:
        is_narrow: tl.constexpr = student.dtype.element_ty != gradient.dtype.element_ty
        terms = _write_gradient(
            head_p, head_q, normal, v_top, mean, shares, num_columns, inv_temperature,
            tl.load(weights + index), gradient + index * gradient_stride,
            KIND, is_narrow, P_BIAS, P_SOFTCAP, Q_BIAS, Q_SOFTCAP, BLOCK,
        )  # fmt: skip
        if KIND == "forward_kl" or KIND == "reverse_kl":
            divergence = terms
    tl.store(results + index, tl.sum(divergence, 0))


def _kind(teacher_part: float, student_part: float, mixture: float, is_tvd: bool) -> str:
    """Returns the kind of divergence that has these numbers of a DivergenceFormula."""
    if is_tvd:
        return "tvd"
    if mixture in (0.0, 1.0):
        return "reverse_kl" if mixture else "forward_kl"
    return "jsd" if teacher_part and student_part else "skewed_forward_kl" if teacher_part else "skewed_reverse_kl"


@on_tensors_device
def row_divergence(
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
    """Fills results (3, R) float32, and the gradient (R, V) unless it is None; see row_kernels.py.

    student, teacher: (R, V) float32|bfloat16|float16, rows contiguous but strided; biases: (V,) or None; weights: (R,)
    float32. The gradient may be `student`'s memory, and one of 16 bits of float32 logits the first half of its rows.
    """
    rows, columns = student.shape
    if rows == 0 or columns == 0:
        return
    to = student if gradient is None else gradient
    row_divergence_kernel[(rows,)](
        student,
        student.stride(0),
        student if student_bias is None else student_bias.contiguous(),
        student_scale,
        student_softcap,
        teacher,
        teacher.stride(0),
        teacher if teacher_bias is None else teacher_bias.contiguous(),
        teacher_scale,
        teacher_softcap,
        columns,
        inv_temperature,
        1 - mixture,
        mixture,
        weights.contiguous(),
        results,
        results.stride(0),
        to,
        to.stride(0),
        KIND=_kind(teacher_part, student_part, mixture, is_tvd),
        HAS_GRADIENT=gradient is not None,
        P_BIAS=student_bias is not None,
        P_SOFTCAP=student_softcap != 0.0,
        Q_BIAS=teacher_bias is not None,
        Q_SOFTCAP=teacher_softcap != 0.0,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS}),
    )
