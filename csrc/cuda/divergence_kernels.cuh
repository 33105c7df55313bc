// The divergence's row kernel for CUDA; trl_fast/ops/divergence/row_kernels.py specifies what it computes.
//
// One block works on one row of both heads, in sweeps: largest logits and sums; the terms of the divergence and their
// rises (formulas.py); the gradient. Of a Kullback-Leibler divergence of the two heads alone the mean rise is known
// after the first sweep: then the last two are one. A sweep reads each logit once, sixteen bytes at a time; p is the
// student's, q the teacher's. No torch headers: the same source compiles as host C++ (tests/support/simt.h).
#pragma once

#include "cuda/row_kernels.cuh"
#include "divergence_types.h"

namespace trl_fast {
namespace {

enum class Divergence { kForwardKl, kReverseKl, kJensenShannon, kSkewedForwardKl, kSkewedReverseKl, kTotalVariation };

template <Divergence kKind>
constexpr bool kIsPlainKl = kKind == Divergence::kForwardKl || kKind == Divergence::kReverseKl;

__device__ inline float log_approx(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result * 0.6931471805599453f;
#else
  return logf(x);
#endif
}

__device__ inline float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// The factor times x, but 0 where it is 0: what is infinite fades with its probability. NaN stays.
__device__ inline float faded(float factor, float x) { return factor == 0.0f ? 0.0f : factor * x; }

// One head's logits of the block's row.
template <bool kPlain>
struct HeadRow {
  const float* logits;
  const float* bias;
  float inner;
  float outer;
  float derivative;

  __device__ explicit HeadRow(const DivergenceSide& side)
      : logits(static_cast<const float*>(side.logits) + blockIdx.x * side.row_stride),
        bias(side.transform.bias),
        inner(side.transform.softcap == 0.0f ? 0.0f : side.transform.scale / side.transform.softcap),
        outer(side.transform.softcap * side.transform.inv_temperature),
        derivative(side.transform.scale * side.transform.inv_temperature) {}

  __device__ Logit operator()(float raw, int column) const {
    if constexpr (kPlain) return {product(raw, derivative), derivative};
    const float z = bias == nullptr ? raw : raw + bias[column];
    if (outer == 0.0f) return {product(z, derivative), derivative};
    const float tanh = tanhf(z * inner);
    return {product(outer, tanh), derivative * (1.0f - tanh * tanh)};
  }
};

// Columns [first, first + kShare) of a row, as far as there are such; kWhole: all or none.
template <bool kWhole>
__device__ Share<float> load_part(const float* row, int first, int columns) {
  if (kWhole || first + kShare > columns || misplaced_bytes(row) != 0) return load_share<kWhole>(row, first, columns);
  return load_share<true>(row, first, columns);
}

template <typename Out>
__device__ void store_part(void* to, int64_t row_start, int first, int columns, const float (&values)[kShare]) {
  Out* row = static_cast<Out*>(to) + row_start;
  Share<Out> share;
  for (int k = 0; k < kShare; ++k) narrow(values[k], share[k]);
  if (first + kShare <= columns && misplaced_bytes(row) == 0) {
    store_share<true>(row, first, columns, share);
  } else {
    store_share<false>(row, first, columns, share);
  }
}

// Goes through a row: visit(first, raw_p, raw_q) gets this thread's share of every chunk, columns from `first` on.
template <bool kWhole, typename Visit>
__device__ void sweep(const float* student, const float* teacher, int columns, Visit visit) {
  int first = threadIdx.x * kShare;
  Share<float> next_p = load_part<kWhole>(student, first, columns);
  Share<float> next_q = load_part<kWhole>(teacher, first, columns);
#pragma unroll 1
  for (int start = 0; start < columns; start += kPackedChunk, first += kPackedChunk) {
    const Share<float> p = next_p, q = next_q;
    next_p = load_part<kWhole>(student, first + kPackedChunk, columns);  // on its way while this one is worked on
    next_q = load_part<kWhole>(teacher, first + kPackedChunk, columns);
    visit(first, p, q);
  }
}

// A head's largest logit so far, and the sum of e^(u - top) of all others: beside its own 1, a sum would lose them.
struct HeadSums {
  float top;
  float others;

  __device__ float total() const { return others + (top == -INFINITY ? 0.0f : 1.0f); }
  __device__ float anchor() const { return top == -INFINITY ? 0.0f : top; }
};

// x = u - top of p. moment = sum of p x; with v_top the other head's logit where p has its largest one,
// cross = sum of p (x - (v - v_top)). choice: the first column that has q's largest logit.
struct RowSums {
  HeadSums p;
  HeadSums q;
  float moment;
  float cross;
  float v_top;
  int choice;
};

__device__ inline RowSums nothing_compared() { return {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}, 0.0f, 0.0f, 0.0f, 0}; }

__device__ inline void raise_p(RowSums& sums, float top, float v_top) {
  const float shift = shift_to(sums.p.top, top), factor = exp_flushed(shift), total = sums.p.total();
  sums.moment = factor * fmaf(shift, total, sums.moment);
  const float change = sums.p.top == -INFINITY ? 0.0f : shift - (sums.v_top - v_top);
  sums.cross = faded(factor, fmaf(change, total, sums.cross));
  sums.p = {top, factor * total};
  sums.v_top = v_top;
}

__device__ inline void raise_q(HeadSums& q, float top) { q = {top, exp_flushed(shift_to(q.top, top)) * q.total()}; }

// The first of the largest logits of a share, and the other head's logit there; NaN is none.
struct Largest {
  float u;
  float other;
  int k;

  __device__ Largest(const float (&of)[kShare], const float (&others)[kShare]) : u(of[0]), other(others[0]), k(0) {
#pragma unroll
    for (int i = 1; i < kShare; ++i) {
      if (of[i] > u) {
        u = of[i];
        other = others[i];
        k = i;
      }
    }
  }
};

// Adds a share of columns from `first` on; logits that are not there are -inf.
template <bool kCross>
__device__ void add(RowSums& sums, const float (&u)[kShare], const float (&v)[kShare], int first) {
  const Largest of_p(u, v), of_q(v, u);
  const bool p_grows = of_p.u > sums.p.top, q_grows = of_q.u > sums.q.top;
  if (q_grows) {
    raise_q(sums.q, of_q.u);
    sums.choice = first + of_q.k;
  }
  if (p_grows) raise_p(sums, of_p.u, of_p.other);
  const float p_anchor = sums.p.anchor(), q_anchor = sums.q.anchor();
#pragma unroll
  for (int k = 0; k < kShare; ++k) {
    const float x = u[k] - p_anchor, y = v[k] - q_anchor;
    const float p = exp_flushed(x), q = exp_flushed(y);
    sums.p.others += p_grows && k == of_p.k ? 0.0f : p;
    sums.q.others += q_grows && k == of_q.k ? 0.0f : q;
    sums.moment += faded(p, x);
    if constexpr (kCross) sums.cross += faded(p, x - (v[k] - sums.v_top));
  }
}

__device__ inline RowSums merged(RowSums a, RowSums b) {
  const bool b_is_first = b.choice < a.choice ? b.q.top >= a.q.top : b.q.top > a.q.top;
  const int choice = b_is_first ? b.choice : a.choice;
  // Of two largest logits, one becomes another one of the sum.
  a.q.top >= b.q.top ? raise_q(b.q, a.q.top) : raise_q(a.q, b.q.top);
  a.p.top >= b.p.top ? raise_p(b, a.p.top, a.v_top) : raise_p(a, b.p.top, b.v_top);
  return {{a.p.top, a.p.others + b.p.others},
          {a.q.top, a.q.others + b.q.others},
          a.moment + b.moment,
          a.cross + b.cross,
          a.v_top,
          choice};
}

template <int kLanes>
__device__ RowSums merged_lanes(RowSums sums) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const auto other = [&](auto value) { return __shfl_xor_sync(kWholeWarp, value, distance); };
    sums = merged(sums, {{other(sums.p.top), other(sums.p.others)},
                         {other(sums.q.top), other(sums.q.others)},
                         other(sums.moment),
                         other(sums.cross),
                         other(sums.v_top),
                         other(sums.choice)});
  }
  return sums;
}

// The sums of the whole block, to every thread the same. Once a kernel.
__device__ inline RowSums merged_block(RowSums sums) {
  __shared__ RowSums of_warp[kWarps];
  __shared__ RowSums of_block;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  sums = merged_lanes<kWarpSize>(sums);
  if (lane == 0) of_warp[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    sums = of_warp[lane % kWarps];
    sums = merged_lanes<kWarps>(sums);
    if (lane == 0) of_block = sums;
  }
  __syncthreads();
  sums = of_block;
  return sums;
}

// The sum over the block, to every thread. Between two calls every thread has read the first one's result.
__device__ inline float block_total(float value) {
  __shared__ float total;
  value = block_sum(value);
  if (threadIdx.x == 0) total = value;
  __syncthreads();
  return total;
}

// A class's probability p, its term of the divergence, and its rise.
struct ClassTerms {
  float p;
  float term;
  float rise;
};

// What a class of a mixture m needs of its two probabilities: the larger one, and the ratio of the smaller to it.
struct Closeness {
  float larger;
  float ratio;
  float distance;  // -log ratio
  float delta;     // 1 - ratio, exact where it is small
  bool p_is_smaller;
};

// With a and b the smaller's and the larger's share, m is the larger times 1 - a delta, the smaller times 1 + b delta
// / ratio. The larger's term is itself times -log(1 - y) - y, y = a delta, the smaller's itself times e - log(1 + e),
// e = b delta / ratio. Rises take logarithms as they are: the gradient's sweep needs no series.
template <Divergence kKind>
__device__ ClassTerms mixture_terms(float p, const Closeness& is, const DivergenceNumbers& numbers) {
  const float p_share = numbers.one_minus_mixture, q_share = numbers.mixture;
  const float a = is.p_is_smaller ? p_share : q_share, b = is.p_is_smaller ? q_share : p_share;
  const float m = fmaf(a, is.ratio, b);
  const float log_larger = -log_approx(m), log_smaller = log_larger - fminf(is.distance, 1e4f);
  const float log_p = is.p_is_smaller ? log_smaller : log_larger;
  const float y = a * is.delta, c = b * is.delta, e = quotient(c, is.ratio);
  const float y_series =
      y * y * (1.0f / 2 + y * (1.0f / 3 + y * (1.0f / 4 + y * (1.0f / 5 + y * (1.0f / 6 + y * (1.0f / 7))))));
  const float e_series =
      c * e * (1.0f / 2 - e * (1.0f / 3 - e * (1.0f / 4 - e * (1.0f / 5 - e * (1.0f / 6 - e * (1.0f / 7))))));
  const float of_larger = y < 0.125f ? y_series : log_larger - y;
  const float of_smaller = c < 0.125f * is.ratio ? e_series : fmaf(is.ratio, log_smaller, c);
  // Shares of a Jensen-Shannon divergence are those of the mixture, too.
  if constexpr (kKind == Divergence::kJensenShannon) {
    return {p, is.larger * (b * of_larger + a * of_smaller), p_share * p * log_p};
  }
  const float difference = quotient(is.p_is_smaller ? is.ratio - 1.0f : 1.0f - is.ratio, m);
  if constexpr (kKind == Divergence::kSkewedForwardKl) {
    return {p, is.larger * (is.p_is_smaller ? of_larger : of_smaller), p_share * p_share * p * difference};
  }
  return {p, is.larger * (is.p_is_smaller ? of_smaller : of_larger), p * (log_p - p_share * q_share * difference)};
}

// Everything comes from the larger of p and q and the ratio of the smaller to it. A term is x (log(x / m) - 1 + m /
// x), which is never negative; with delta = 1 - ratio and psi = -log ratio - delta by their series where these are
// small, nothing cancels in it.
template <Divergence kKind>
__device__ ClassTerms class_terms(float log_p, float log_q, const DivergenceNumbers& numbers) {
  const float top = fmaxf(log_p, log_q), gap = top == -INFINITY ? 0.0f : log_p - log_q;
  const float distance = fabsf(gap), larger = exp_flushed(top), ratio = exp_flushed(-distance);
  const bool p_is_smaller = gap < 0.0f;
  const float p = larger * (gap >= 0.0f ? 1.0f : ratio);  // NaN is not above
  const float series =
      distance * distance * (0.5f - distance * (1.0f / 6 - distance * (1.0f / 24 - distance * (1.0f / 120))));
  const bool near = distance < 0.125f;
  const float delta = near ? distance - series : 1.0f - ratio;
  if constexpr (kKind == Divergence::kTotalVariation) {
    const float sign = gap == 0.0f ? 0.0f : p_is_smaller ? -0.5f : 0.5f;
    return {p, 0.5f * larger * delta, sign * p};
  }
  const float psi = near ? series : distance - delta;
  if constexpr (kIsPlainKl<kKind>) {
    // m is p or q. An infinite psi would make NaN of a ratio of 0.
    const bool of_smaller = p_is_smaller == (kKind == Divergence::kReverseKl);
    const float term = of_smaller ? larger * (delta * delta - ratio * fminf(psi, 1e4f)) : faded(larger, psi);
    return {p, term, kKind == Divergence::kReverseKl ? faded(p, gap) : larger * (p_is_smaller ? -delta : delta)};
  }
  return mixture_terms<kKind>(p, {larger, ratio, distance, delta, p_is_smaller}, numbers);
}

// What is subtracted from a head's logits for log-probabilities: the largest one, then the logarithm of the sum.
struct Normalizer {
  float top;
  float log_sum;

  // NaN if the largest logit is no number.
  __device__ explicit Normalizer(const HeadSums& sums)
      : top(sums.top), log_sum(fabsf(sums.top) < INFINITY ? log1pf(sums.others) : NAN) {}

  __device__ float operator()(float u) const { return u - top - log_sum; }
};

// A thread's logits of its share, -inf where there are none.
template <bool kWhole, bool kPlain>
__device__ void logits_of(const HeadRow<kPlain>& head, const Share<float>& raw, int first, int columns,
                          float (&u)[kShare]) {
#pragma unroll
  for (int k = 0; k < kShare; ++k) {
    const bool there = kWhole ? first < columns : first + k < columns;
    u[k] = there ? head(raw[k], first + k).u : -INFINITY;
  }
}

template <Divergence kKind, bool kPlain, bool kWhole>
__device__ void divergence_row(const DivergenceArgs& args, const HeadRow<kPlain>& student,
                               const HeadRow<kPlain>& teacher) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(args.columns);
  float* results = args.results + row;
  RowSums sums = nothing_compared();
  sweep<kWhole>(student.logits, teacher.logits, columns,
                [&](int first, const Share<float>& raw_p, const Share<float>& raw_q) {
                  float u[kShare], v[kShare];
                  logits_of<kWhole>(student, raw_p, first, columns, u);
                  logits_of<kWhole>(teacher, raw_q, first, columns, v);
                  add<kKind == Divergence::kReverseKl>(sums, u, v, first);
                });
  sums = merged_block(sums);
  const Normalizer log_p(sums.p), log_q(sums.q);
  const float total = 1.0f + sums.p.others;
  if (threadIdx.x == 0) {
    results[kStudentEntropy * args.results_stride] = log_p.log_sum - sums.moment / total;
    const float chosen = student(student.logits[sums.choice], sums.choice).u;
    results[kIsSameTop1 * args.results_stride] = chosen >= sums.p.top ? 1.0f : 0.0f;
  }
  __syncthreads();                       // a gradient may take the place of what was chosen
  float divergence = 0.0f, mean = 0.0f;  // rises of a forward KL are p - q, which add up to 0
  // Those of a reverse KL are taken relative to that of the largest logit: in a sure row nothing else would be left.
  if constexpr (kKind == Divergence::kReverseKl) mean = sums.cross / total;
  if (!kIsPlainKl<kKind> || args.gradient == nullptr) {
    float rises = 0.0f;
    sweep<kWhole>(student.logits, teacher.logits, columns,
                  [&](int first, const Share<float>& raw_p, const Share<float>& raw_q) {
                    float u[kShare], v[kShare];
                    logits_of<kWhole>(student, raw_p, first, columns, u);
                    logits_of<kWhole>(teacher, raw_q, first, columns, v);
#pragma unroll
                    for (int k = 0; k < kShare; ++k) {
                      const ClassTerms of = class_terms<kKind>(log_p(u[k]), log_q(v[k]), args.numbers);
                      divergence += of.term;
                      rises += of.rise;
                    }
                  });
    if (args.gradient != nullptr) mean = block_total(rises);
  }
  if (args.gradient != nullptr) {
    const float weight = args.weights[row];
    const int64_t start = row * args.gradient_stride;
    sweep<kWhole>(
        student.logits, teacher.logits, columns, [&](int first, const Share<float>& raw_p, const Share<float>& raw_q) {
          float gradient[kShare];
#pragma unroll
          for (int k = 0; k < kShare; ++k) {
            const bool there = kWhole ? first < columns : first + k < columns;
            const Logit u = student(raw_p[k], there ? first + k : 0), v = teacher(raw_q[k], there ? first + k : 0);
            const ClassTerms of = class_terms<kKind>(log_p(u.u), log_q(v.u), args.numbers);
            if constexpr (kIsPlainKl<kKind>) divergence += there ? of.term : 0.0f;
            float change = of.rise - of.p * mean;
            if constexpr (kKind == Divergence::kReverseKl) {
              change = faded(of.p, (u.u - sums.p.top) - (v.u - sums.v_top) - mean);
            }
            gradient[k] = weight == 0.0f ? 0.0f : weight * u.derivative * change;
          }
          switch (args.gradient_dtype) {
            case Dtype::kFloat32:
              return store_part<float>(args.gradient, start, first, columns, gradient);
            // A narrower one may lie in the first half of the row: what it covers of it has to be read.
            case Dtype::kBFloat16:
              __syncthreads();
              return store_part<__nv_bfloat16>(args.gradient, start, first, columns, gradient);
            case Dtype::kFloat16:
              __syncthreads();
              return store_part<__half>(args.gradient, start, first, columns, gradient);
          }
        });
  }
  divergence = block_sum(divergence);
  if (threadIdx.x == 0) results[kDivergence * args.results_stride] = divergence;
}

// Left alone, the compiler spills a few registers to fit more than these blocks into a multiprocessor.
constexpr int kBlocksAtOnce = 2;

// One block a row. kPlain: neither head has a bias or a softcap.
template <Divergence kKind, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) row_divergence_kernel(DivergenceArgs args) {
  const HeadRow<kPlain> student(args.student), teacher(args.teacher);
  const int columns = static_cast<int>(args.columns);
  if (has_whole_shares(student.logits, columns) && has_whole_shares(teacher.logits, columns)) {
    divergence_row<kKind, kPlain, true>(args, student, teacher);
  } else {
    divergence_row<kKind, kPlain, false>(args, student, teacher);
  }
}

inline Divergence kind_of(const DivergenceNumbers& numbers) {
  if (numbers.is_tvd) return Divergence::kTotalVariation;
  if (numbers.mixture == 0.0f) return Divergence::kForwardKl;
  if (numbers.one_minus_mixture == 0.0f) return Divergence::kReverseKl;
  if (numbers.student_part == 0.0f) return Divergence::kSkewedForwardKl;
  return numbers.teacher_part == 0.0f ? Divergence::kSkewedReverseKl : Divergence::kJensenShannon;
}

// Calls visit with the kind as a type.
template <typename Visit>
void with_kind(Divergence kind, Visit visit) {
  switch (kind) {
    case Divergence::kForwardKl:
      return visit(std::integral_constant<Divergence, Divergence::kForwardKl>{});
    case Divergence::kReverseKl:
      return visit(std::integral_constant<Divergence, Divergence::kReverseKl>{});
    case Divergence::kJensenShannon:
      return visit(std::integral_constant<Divergence, Divergence::kJensenShannon>{});
    case Divergence::kSkewedForwardKl:
      return visit(std::integral_constant<Divergence, Divergence::kSkewedForwardKl>{});
    case Divergence::kSkewedReverseKl:
      return visit(std::integral_constant<Divergence, Divergence::kSkewedReverseKl>{});
    case Divergence::kTotalVariation:
      return visit(std::integral_constant<Divergence, Divergence::kTotalVariation>{});
  }
}

// Calls launch(kernel, grid) with the instance that serves `args`, of float32 logits; does nothing for empty rows.
template <typename Launch>
void dispatch_divergence(const DivergenceArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.columns == 0) return;
  const auto is_plain = [](const Transform& t) { return t.bias == nullptr && t.softcap == 0.0f; };
  with_kind(kind_of(args.numbers), [&](auto kind) {
    with_flag(is_plain(args.student.transform) && is_plain(args.teacher.transform), [&](auto plain) {
      launch(row_divergence_kernel<decltype(kind)::value, decltype(plain)::value>, dim3(static_cast<unsigned>(rows)));
    });
  });
}

}  // namespace
}  // namespace trl_fast
