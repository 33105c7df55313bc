// The divergence's row kernel of one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// Three sweeps over a row of both heads, in chunks that stay in the first-level cache: largest logits and sums; the
// terms of the divergence; the gradient, written over the student's logits. A row of both stays in the second-level
// cache meanwhile. Sums run in vector lanes within a chunk and in double across chunks.
#include "divergence_kernels.h"

#include <algorithm>
#include <bit>

#include "row_chunks.h"

namespace {

using trl_fast::DivergenceArgs;
using trl_fast::DivergenceNumbers;
using trl_fast::DivergenceSide;
using trl_fast::Dtype;

// Which terms of formulas.py are not zero.
enum class Kind { kForward, kReverse, kJensenShannon, kSkewed, kTotalVariation };

inline Vec absolute(Vec x) { return x < Vec{} ? -x : x; }

// Where it is smaller, differences of e^x are taken from series.
constexpr float kSmall = 0.5f;

// (e^-x - 1 + x) / x^2, |x| <= kSmall
inline Vec curve(Vec x) {
  Vec p = splat(1.0f / 40320) * x - splat(1.0f / 5040);
  p = p * x + splat(1.0f / 720);
  p = p * x - splat(1.0f / 120);
  p = p * x + splat(1.0f / 24);
  p = p * x - splat(1.0f / 6);
  return p * x + splat(0.5f);
}

// log(x + lost) to about 1 ulp for x > 0 and the little that its rounding lost (Cephes logf).
inline Vec log_vec(Vec x, Vec lost) {
  // x = 2^n m, m from sqrt(1/2) to sqrt(2)
  const UVec bits = bits_as<UVec>(x), half_root = UVec{} + std::bit_cast<uint32_t>(0.70710678f);
  const UVec shifted = bits - half_root;
  const UVec power = shifted & (UVec{} + 0xff800000u);
  typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
  const Vec n = __builtin_convertvector(bits_as<IVec>(power) >> 23, Vec);
  const Vec y = bits_as<Vec>(bits - power) - splat(1.0f);
  const Vec z = y * y;
  Vec p = splat(7.0376836292e-2f) * y - splat(1.1514610310e-1f);
  p = p * y + splat(1.1676998740e-1f);
  p = p * y - splat(1.2420140846e-1f);
  p = p * y + splat(1.4249322787e-1f);
  p = p * y - splat(1.6668057665e-1f);
  p = p * y + splat(2.0000714765e-1f);
  p = p * y - splat(2.4999993993e-1f);
  p = p * y + splat(3.3333331174e-1f);
  p = p * y * z - n * splat(2.12194440e-4f) - splat(0.5f) * z;
  return y + (p + lost / x) + n * splat(0.693359375f);
}

// p log(p/q) - p + q
inline Vec kl_term(Vec p, Vec q, Vec log_ratio) {
  const Vec near = p * (log_ratio * log_ratio * curve(log_ratio));
  const Vec far = p * log_ratio - p + q;
  const Vec term = absolute(log_ratio) < splat(kSmall) ? near : far;
  return p == Vec{} ? q : term;
}

struct Terms {
  Vec p;      // of the student
  Vec value;  // of the divergence
  // Its derivative by the student's probability, times that: less what it is where both probabilities are the same,
  // and less what it is where the teacher's is none.
  Vec rise, far;
};

template <Kind kKind>
inline Terms terms(Vec logp_s, Vec logp_t, const DivergenceNumbers& numbers) {
  const Vec p_s = exp_vec(logp_s), p_t = exp_vec(logp_t);
  const Vec d = logp_s == logp_t ? Vec{} : logp_t - logp_s;
  if constexpr (kKind == Kind::kReverse) return {p_s, kl_term(p_s, p_t, -d), p_s == Vec{} ? Vec{} : -p_s * d, Vec{}};
  const Vec distance = absolute(d);
  const auto is_small = distance < splat(kSmall);
  const Vec difference = is_small ? -p_s * (d + d * d * curve(-d)) : p_s - p_t;
  if constexpr (kKind == Kind::kForward) return {p_s, kl_term(p_t, p_s, d), difference, Vec{}};
  if constexpr (kKind == Kind::kTotalVariation) {
    const Vec half = splat(0.5f) * p_s;
    const Vec with_sign = difference < Vec{} ? -half : half;
    return {p_s, splat(0.5f) * absolute(difference), difference == Vec{} ? Vec{} : with_sign, Vec{}};
  }
  const Vec w = splat(numbers.mixture), rest = splat(numbers.one_minus_mixture);
  const auto falls = d <= Vec{};
  // The larger of both lies closer to the mixture: its log-ratio to that, then the other's.
  // m by that one: 1 - share + share e^-distance.
  const Vec share = falls ? w : rest, change = share * (d * d * curve(distance) - distance);
  const Vec sum = is_small ? splat(1.0f) + change : (falls ? rest : w) + share * exp_vec(-distance);
  const Vec near = -log_vec(sum, is_small ? change - (sum - splat(1.0f)) : Vec{});
  const Vec ratio_s = falls ? near : near - d, ratio_t = falls ? near + d : near;
  const Vec m = rest * p_s + w * p_t;
  const Vec student_part = splat(numbers.student_part), teacher_part = splat(numbers.teacher_part);
  const Vec value = (numbers.teacher_part == 0 ? Vec{} : teacher_part * kl_term(p_t, m, ratio_t)) +
                    (numbers.student_part == 0 ? Vec{} : student_part * kl_term(p_s, m, ratio_s));
  const Vec rise = p_s == Vec{} ? Vec{} : student_part * p_s * ratio_s;
  if constexpr (kKind == Kind::kJensenShannon) return {p_s, value, rise, Vec{}};
  const Vec tilt = splat(numbers.tilt), t = m == Vec{} ? Vec{} : p_t / m;
  // A product of two probabilities may be below float's range.
  const Vec tilted = m == Vec{} ? Vec{} : tilt * difference * (rest * p_s / m);
  Vec far = -tilt * t;
  if (numbers.student_part != 0) {
    // log(1 - w t), the rest being (1 - w) s / m
    const Vec product = w * t, left = maximum(splat(1.0f) - product, splat(1.2e-38f));
    const auto is_little = product < splat(0.5f);
    const Vec exact = is_little ? left : maximum(m == Vec{} ? splat(1.0f) : rest * p_s / m, splat(1.2e-38f));
    far += student_part * log_vec(exact, is_little ? (splat(1.0f) - left) - product : Vec{});
  }
  return {p_s, value, rise + tilted, p_s * far};
}

void logits_of(const DivergenceSide& side, int64_t row, int64_t start, int64_t n, float* u,
               float* derivative = nullptr) {
  const int64_t first = row * side.row_stride;
  switch (side.dtype) {
    case Dtype::kFloat32:
      return logits_chunk(static_cast<const float*>(side.logits) + first, side.transform, start, n, u, derivative);
    case Dtype::kBFloat16:
      return logits_chunk(static_cast<const BFloat16*>(side.logits) + first, side.transform, start, n, u, derivative);
    case Dtype::kFloat16:
      return logits_chunk(static_cast<const Float16*>(side.logits) + first, side.transform, start, n, u, derivative);
  }
}

void write_gradient(const DivergenceArgs& args, int64_t row, int64_t start, int64_t n, const float* gradient) {
  const int64_t first = row * args.gradient_stride + start;
  switch (args.gradient_dtype) {
    case Dtype::kFloat32:
      return narrow_chunk(gradient, n, static_cast<float*>(args.gradient) + first);
    case Dtype::kBFloat16:
      return narrow_chunk(gradient, n, static_cast<BFloat16*>(args.gradient) + first);
    case Dtype::kFloat16:
      return narrow_chunk(gradient, n, static_cast<Float16*>(args.gradient) + first);
  }
}

// Calls f(start, size) for blocks of a chunk that are short enough to be summed in float.
template <typename F>
inline void for_blocks(int64_t n, F f) {
  constexpr int64_t block = 32 * kWidth;
  for (int64_t start = 0; start < n; start += block) f(start, std::min(block, n - start));
}

// The largest logit m of a row so far, how many logits are as large, and the others' sum of e^(u - m). Apart: beside
// its 1, a sum in float would lose the others where the row is sure.
struct Normalizer {
  float m = -kInf;
  double tops = 0, others = 0;

  // Adds a chunk; returns whether its largest logit is above all before.
  bool add(const float* u, int64_t n) {
    Vec best[2] = {splat(-kInf), splat(-kInf)};
    for_vectors(n, [&](int64_t i, int k) { best[k] = maximum(load(u + i), best[k]); });
    const float top = max_of(maximum(best[0], best[1]));
    const bool grows = top > m;
    if (grows) {
      if (m > -kInf) others = std::exp(static_cast<double>(m) - top) * (others + tops);
      tops = 0;
      m = top;
    }
    // A chunk of nothing but -inf adds nothing; -inf - -inf would be NaN. But NaN has to be seen.
    if (m == -kInf && std::all_of(u, u + n, [](float x) { return x == -kInf; })) return false;
    const Vec largest = splat(m), one = splat(1.0f);
    for_blocks(n, [&](int64_t start, int64_t size) {
      Vec sum[2] = {}, count[2] = {};
      for_vectors(size, [&](int64_t i, int k) {
        const Vec x = load(u + start + i) - largest;
        const auto is_top = x == Vec{};
        sum[k] += is_top ? Vec{} : exp_vec(x);
        count[k] += is_top ? one : Vec{};
      });
      others += sum_of(sum[0]) + sum_of(sum[1]);
      tops += sum_of(count[0]) + sum_of(count[1]);
    });
    return grows;
  }

  // log of the sum of all e^(u - m)
  float log_sum() const { return static_cast<float>(std::log(tops) + std::log1p(others / tops)); }
};

// u becomes log-probabilities.
void normalize(float* u, int64_t n, float m, float log_sum) {
  const Vec largest = splat(m), sum = splat(log_sum);
  for (int64_t i = 0; i < n; i += kWidth) store(u + i, load(u + i) - largest - sum);
}

template <Kind kKind>
void divergence_row(const DivergenceArgs& args, int64_t row) {
  alignas(64) float s[kChunk], t[kChunk], derivative[kChunk];
  const int64_t columns = args.columns;
  float* results = args.results + row;
  Normalizer student, teacher;
  float at_teachers_top = 0;
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    logits_of(args.student, row, start, n, s);
    logits_of(args.teacher, row, start, n, t);
    student.add(s, n);
    if (teacher.add(t, n)) at_teachers_top = s[std::find(t, t + n, teacher.m) - t];
  }
  const float sum_s = student.log_sum(), sum_t = teacher.log_sum();
  double value = 0, rise = 0, far = 0, entropy = 0;
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    logits_of(args.student, row, start, n, s);
    logits_of(args.teacher, row, start, n, t);
    normalize(s, n, student.m, sum_s);
    normalize(t, n, teacher.m, sum_t);
    for_blocks(n, [&](int64_t first, int64_t size) {
      Vec values[2] = {}, rises[2] = {}, fars[2] = {}, entropies[2] = {};
      for_vectors(size, [&](int64_t i, int k) {
        const Vec logp = load(s + first + i);
        const Terms found = terms<kKind>(logp, load(t + first + i), args.numbers);
        values[k] += found.value;
        rises[k] += found.rise;
        if constexpr (kKind == Kind::kSkewed) fars[k] += found.far;
        entropies[k] -= found.p == Vec{} ? Vec{} : found.p * logp;
      });
      value += sum_of(values[0]) + sum_of(values[1]);
      rise += sum_of(rises[0]) + sum_of(rises[1]);
      far += sum_of(fars[0]) + sum_of(fars[1]);
      entropy += sum_of(entropies[0]) + sum_of(entropies[1]);
    });
  }
  results[trl_fast::kDivergence * args.results_stride] = static_cast<float>(value);
  results[trl_fast::kStudentEntropy * args.results_stride] = static_cast<float>(entropy);
  results[trl_fast::kIsSameTop1 * args.results_stride] = at_teachers_top >= student.m ? 1.0f : 0.0f;
  if (!args.gradient) return;
  // Of the forward KL the rises sum up to 1 - 1.
  const bool is_far = kKind == Kind::kSkewed && std::abs(far) < std::abs(rise);
  const Vec mean = splat(kKind == Kind::kForward ? 0.0f : static_cast<float>(is_far ? far : rise));
  const Vec weight = splat(args.weights[row]);
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    if (args.weights[row] == 0.0f) {
      std::fill(s, s + padded(n), 0.0f);
    } else {
      logits_of(args.student, row, start, n, s, derivative);
      logits_of(args.teacher, row, start, n, t);
      normalize(s, n, student.m, sum_s);
      normalize(t, n, teacher.m, sum_t);
      for (int64_t i = 0; i < n; i += kWidth) {
        const Terms found = terms<kKind>(load(s + i), load(t + i), args.numbers);
        store(s + i, ((is_far ? found.far : found.rise) - found.p * mean) * (weight * load(derivative + i)));
      }
    }
    write_gradient(args, row, start, n, s);
  }
}

template <Kind kKind>
void divergence_rows(const DivergenceArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) divergence_row<kKind>(args, row);
}

void divergence(const DivergenceArgs& args, int64_t begin, int64_t end) {
  const DivergenceNumbers& numbers = args.numbers;
  if (numbers.is_tvd) return divergence_rows<Kind::kTotalVariation>(args, begin, end);
  if (numbers.mixture == 0) return divergence_rows<Kind::kForward>(args, begin, end);
  if (numbers.one_minus_mixture == 0) return divergence_rows<Kind::kReverse>(args, begin, end);
  if (numbers.tilt == 0) return divergence_rows<Kind::kJensenShannon>(args, begin, end);
  divergence_rows<Kind::kSkewed>(args, begin, end);
}

}  // namespace

namespace trl_fast {

extern const DivergenceKernels TRL_FAST_JOIN(kDivergenceKernels, CPU_CAPABILITY);
const DivergenceKernels TRL_FAST_JOIN(kDivergenceKernels, CPU_CAPABILITY) = {divergence};

}  // namespace trl_fast
