// The row kernels of one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// A tile's row is read in chunks that stay in the first-level cache. Logits that nothing changes are read where they
// lie, others are widened and transformed in a copy. Sums run in vector lanes within a chunk and in double across
// chunks.
#include "row_kernels.h"

#include <algorithm>
#include <type_traits>

#include "packed_row_chunks.h"
#include "row_chunks.h"

namespace {

using trl_fast::Dtype;
using trl_fast::GradArgs;
using trl_fast::LogitTile;
using trl_fast::PackedRow;
using trl_fast::PackedRows;
using trl_fast::ScoreArgs;
using trl_fast::Transform;

// Logits are read two vectors at a time, and fetched so many before that: a CPU fetches none across a page's end.
constexpr int64_t kPair = 2 * kWidth, kAhead = 1024;
static_assert(kChunk % kPair == 0);

// Whether a pointer to logits is one to a copy, which may be changed.
template <typename Pointer>
constexpr bool is_copy = std::is_same_v<Pointer, float*>;

// Calls f with the logits of columns [start, start + n): where they lie, if they are whole pairs that nothing changes,
// else in `room`, padded with -inf to whole pairs. copies: always there.
template <typename Row, typename F>
inline void with_chunk(const Row& row, const Transform& t, int64_t start, int64_t n, bool copies, float* room,
                       float* derivative, F f) {
  if constexpr (std::is_pointer_v<Row>) {
    const bool plain = !t.bias && t.softcap == 0.0f && t.scale == 1.0f && t.inv_temperature == 1.0f;
    if (plain && !copies && n % kPair == 0) return f(row + start);
  }
  logits_chunk(row, t, start, n, room, derivative);
  const int64_t filled = padded(n);
  if (filled % kPair != 0) {
    store(room + filled, splat(-kInf));
    if (derivative) store(derivative + filled, Vec{});
  }
  f(room);
}

// Narrows the first n of a pair that was read from numbers of type From.
template <typename From, typename T>
inline void narrow_first(VecPair x, int64_t n, T* to) {
  if (n < kPair) {
    narrow_part(x.a, n, to);
    if (n > kWidth) narrow_part(x.b, n - kWidth, to + kWidth);
  } else if constexpr (std::is_same_v<From, T>) {
    narrow_pair(to, x);
  } else {
    narrow(to, x.a);
    narrow(to + kWidth, x.b);
  }
}

template <typename Row>
float derivative_at(const Row& row, const Transform& t, int64_t column) {
  float u[kWidth], derivatives[kWidth];
  logits_chunk(row, t, column, 1, u, derivatives);
  return derivatives[0];
}

// Sums of a chunk, of e^(u-m), e^(u-m) (u-m) and e^2(u-m), and its largest logit.
struct ChunkSums {
  double s, sx, sq;
  float top;
};

// Online sums of a row without its target, relative to their running maximum m, as they stand in the row's state.
struct Online {
  float m;
  double s, sx, sq, total;

  static Online of(const double* state, int64_t stride) {
    using namespace trl_fast;
    return {static_cast<float>(state[kTop * stride]), state[kSum * stride], state[kSumX * stride],
            state[kSumSq * stride], state[kTotal * stride]};
  }

  void save(double* state, int64_t stride) const {
    using namespace trl_fast;
    state[kTop * stride] = m;
    state[kSum * stride] = s;
    state[kSumX * stride] = sx;
    state[kSumSq * stride] = sq;
    state[kTotal * stride] = total;
  }

  // What is subtracted: -inf - -inf would be NaN.
  float anchor() const { return m > -kInf ? m : 0.0f; }

  void raise(float to) {
    if (!(to > m)) return;
    if (m > -kInf) {
      const double shift = static_cast<double>(m) - to, factor = std::exp(shift);
      sx = factor * (sx + shift * s);
      s *= factor;
      sq *= factor * factor;
    }
    m = to;
  }

  void add(const ChunkSums& sums) {
    s += sums.s;
    sx += sums.sx;
    sq += sums.sq;
  }
};

template <typename T>
float chunk_max(const T* u, int64_t n) {
  Vec best[2] = {splat(-kInf), splat(-kInf)};
  for (int64_t i = 0; i < n; i += kPair) {
    __builtin_prefetch(u + i + kAhead);
    const VecPair logits = widen_pair(u + i);
    best[0] = maximum(logits.a, best[0]);
    best[1] = maximum(logits.b, best[1]);
  }
  return max_of(maximum(best[0], best[1]));
}

// One vector's share of ChunkSums.
template <bool kMoments>
struct VectorSums {
  Vec s = {}, sx = {}, sq = {}, best = splat(-kInf);

  // Returns e^(logits - m).
  Vec add(Vec logits, Vec m) {
    const Vec x = logits - m;
    const Vec e = exp_vec(x);
    best = maximum(logits, best);
    s += e;
    if constexpr (kMoments) {
      sx += e > Vec{} ? e * x : e;  // not 0 * -inf
      sq += e * e;
    }
    return e;
  }
};

// take(i, e): gets a pair of e^(u - anchor).
template <bool kMoments, typename T, typename Take>
ChunkSums chunk_sums(const T* u, int64_t n, float anchor, Take take) {
  const Vec m = splat(anchor);
  VectorSums<kMoments> one, two;
  for (int64_t i = 0; i < n; i += kPair) {
    __builtin_prefetch(u + i + kAhead);
    const VecPair logits = widen_pair(u + i);
    take(i, VecPair{one.add(logits.a, m), two.add(logits.b, m)});
  }
  return {sum_of(one.s) + sum_of(two.s), sum_of(one.sx) + sum_of(two.sx), sum_of(one.sq) + sum_of(two.sq),
          max_of(maximum(one.best, two.best))};
}

// Without padding.
template <typename T>
double chunk_total(const T* u, int64_t n) {
  Vec total[2] = {};
  const int64_t whole = n / kPair * kPair;
  for (int64_t i = 0; i < whole; i += kPair) {
    const VecPair logits = widen_pair(u + i);
    total[0] += logits.a;
    total[1] += logits.b;
  }
  double sum = sum_of(total[0]) + sum_of(total[1]);
  if constexpr (std::is_same_v<T, float>) {  // others lie in whole pairs
    for (int64_t i = whole; i < n; ++i) sum += u[i];
  }
  return sum;
}

// The largest logit of a tile's row but for its target; `room` is scratch.
template <typename T>
float row_max(const T* row, const ScoreArgs& args, int64_t target, float* room) {
  const int64_t columns = args.tile.columns;
  float top = -kInf;
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    const bool has_target = target >= start && target < start + n;
    with_chunk(row, args.transform, start, n, has_target, room, nullptr, [&](auto* u) {
      if constexpr (is_copy<decltype(u)>) {
        if (has_target) u[target - start] = -kInf;
      }
      top = std::max(top, chunk_max(u, n));
    });
  }
  return top;
}

// The target's logit goes to the state; everything else sees -inf in its place. A chunk is read once: if it has a
// larger logit than all before it, its sums are taken again. With kWeights, the row's e^(u - top) du/dz go to
// `weights`, relative to its largest logit with this tile, which takes a look ahead. `packed`, unless null, takes the
// logits.
template <typename T, bool kMoments, bool kWeights>
void score_row(const T* row, const ScoreArgs& args, int64_t target, double* state, T* weights,
               const PackedRow* packed) {
  using namespace trl_fast;
  alignas(64) float room[kChunk], derivative[kWeights ? kChunk : 1];
  const int64_t stride = args.state_stride, columns = args.tile.columns;
  const bool curved = kWeights && args.transform.softcap != 0.0f, finds_first = args.outputs & kIsTop1;
  const Vec constant_derivative = splat(args.transform.scale * args.transform.inv_temperature);
  Online online = Online::of(state, stride);
  float before = static_cast<float>(state[kBefore * stride]);
  if (kWeights) online.raise(row_max(row, args, target, room));
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    const bool has_target = target >= start && target < start + n;
    with_chunk(row, args.transform, start, n, has_target, room, curved ? derivative : nullptr, [&](auto* u) {
      if (args.outputs & kMeanLogits) online.total += chunk_total(u, n);
      if constexpr (is_copy<decltype(u)>) {
        if (has_target) {
          state[kTarget * stride] = u[target - start];
          u[target - start] = -kInf;
          if (finds_first && target > start) before = std::max(before, *std::max_element(u, u + (target - start)));
        }
      }
      const auto take = [&](int64_t i, VecPair e) {
        if constexpr (kWeights) {
          e.a *= curved ? load(derivative + i) : constant_derivative;
          e.b *= curved ? load(derivative + i + kWidth) : constant_derivative;
          narrow_first<std::decay_t<decltype(*u)>>(e, n - i, weights + start + i);
        }
      };
      ChunkSums sums = chunk_sums<kMoments>(u, n, online.anchor(), take);
      if (sums.top > online.m) {
        online.raise(sums.top);
        sums = chunk_sums<kMoments>(u, n, online.anchor(), take);
      }
      online.add(sums);
      if (finds_first && target >= start + n) before = std::max(before, sums.top);
      if constexpr (std::is_same_v<T, float>) {
        if (packed) pack_chunk(u, n, sums.top, packed->chunk(start / kChunk));
      }
    });
  }
  online.save(state, stride);
  state[kBefore * stride] = before;
}

template <typename T, bool kWeights>
void scores(const ScoreArgs& args, const PackedRows* packed, int64_t begin, int64_t end) {
  using namespace trl_fast;
  const bool moments = args.outputs & (kEntropy | kLogSumSqProbs);
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(args.tile.logits) + r * args.tile.row_stride;
    const int64_t target = args.tile.targets[r] - args.tile.column_offset;
    T* weights = kWeights ? static_cast<T*>(args.weights) + r * args.weights_stride : nullptr;
    const auto score = moments ? score_row<T, true, kWeights> : score_row<T, false, kWeights>;
    const PackedRow packed_row = packed ? packed->row(r) : PackedRow{};
    score(row, args, target, args.state + r, weights, packed ? &packed_row : nullptr);
  }
}

struct RowCoefficients {
  float a, b, d, e;
};

// p (a + b (u - lse)) + e, of every class but the target
template <bool kHasB>
inline Vec logit_grad(Vec u, Vec lse, Vec a, Vec b, Vec e) {
  const Vec x = u - lse;
  const Vec p = exp_vec(x);
  if constexpr (!kHasB) return p * a + e;
  const Vec product = p * (a + b * x);
  return (p == Vec{} ? Vec{} : product) + e;
}

template <bool kHasB, typename Row, typename T>
void grad_columns(const Row& row, const GradArgs& args, float lse, const RowCoefficients& c, T* out) {
  alignas(64) float room[kChunk], derivative[kChunk];
  const int64_t columns = args.tile.columns;
  const bool curved = args.transform.softcap != 0.0f;
  const float factor = curved ? 1.0f : args.transform.scale * args.transform.inv_temperature;
  const Vec lse_vec = splat(lse), a = splat(c.a * factor), b = splat(c.b * factor), e = splat(c.e * factor);
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    with_chunk(row, args.transform, start, n, false, room, curved ? derivative : nullptr, [&](auto* u) {
      for (int64_t i = 0; i < n; i += kPair) {
        __builtin_prefetch(u + i + kAhead);
        VecPair grad = widen_pair(u + i);
        grad.a = logit_grad<kHasB>(grad.a, lse_vec, a, b, e);
        grad.b = logit_grad<kHasB>(grad.b, lse_vec, a, b, e);
        if (curved) {
          grad.a *= load(derivative + i);
          grad.b *= load(derivative + i + kWidth);
        }
        narrow_first<std::decay_t<decltype(*u)>>(grad, n - i, out + start + i);
      }
    });
  }
}

template <typename Row, typename T>
void grad_row(const Row& row, const GradArgs& args, float lse, int64_t target, const RowCoefficients& c, T* out) {
  const bool has_target = target >= 0 && target < args.tile.columns;
  // Before `out`, which may be `row`, is written.
  const float target_grad = has_target ? c.d * derivative_at(row, args.transform, target) : 0;
  (c.b == 0.0f ? grad_columns<false, Row, T> : grad_columns<true, Row, T>)(row, args, lse, c, out);
  if (has_target) narrow_part(splat(target_grad), 1, out + target);
}

// rows(r): the logits of the tile's row r.
template <typename T, typename Rows>
void grad(const GradArgs& args, int64_t begin, int64_t end, Rows rows) {
  const int64_t stride = args.coefficient_stride;
  for (int64_t r = begin; r < end; ++r) {
    const float* c = args.coefficients + r;
    grad_row(rows(r), args, args.lse[r], args.tile.targets[r] - args.tile.column_offset,
             {c[0], c[stride], c[2 * stride], c[3 * stride]}, static_cast<T*>(args.out) + r * args.out_stride);
  }
}

template <typename T>
void grad_of(const GradArgs& args, int64_t begin, int64_t end) {
  const T* logits = static_cast<const T*>(args.tile.logits);
  grad<T>(args, begin, end, [&](int64_t r) { return logits + r * args.tile.row_stride; });
}

template <bool kWeights>
void scores_any(const ScoreArgs& args, int64_t begin, int64_t end) {
  switch (args.tile.dtype) {
    case Dtype::kFloat32:
      return scores<float, kWeights>(args, nullptr, begin, end);
    case Dtype::kBFloat16:
      return scores<BFloat16, kWeights>(args, nullptr, begin, end);
    case Dtype::kFloat16:
      return scores<Float16, kWeights>(args, nullptr, begin, end);
  }
}

void grad_any(const GradArgs& args, int64_t begin, int64_t end) {
  switch (args.tile.dtype) {
    case Dtype::kFloat32:
      return grad_of<float>(args, begin, end);
    case Dtype::kBFloat16:
      return grad_of<BFloat16>(args, begin, end);
    case Dtype::kFloat16:
      return grad_of<Float16>(args, begin, end);
  }
}

void scores_packed(const ScoreArgs& args, const PackedRows& packed, int64_t begin, int64_t end) {
  scores<float, false>(args, &packed, begin, end);
}

void grad_packed(const GradArgs& args, const PackedRows& packed, int64_t begin, int64_t end) {
  grad<float>(args, begin, end, [&](int64_t r) { return packed.row(r); });
}

}  // namespace

namespace trl_fast {

extern const RowKernels TRL_FAST_JOIN(kRowKernels, CPU_CAPABILITY);
const RowKernels TRL_FAST_JOIN(kRowKernels, CPU_CAPABILITY) = {scores_any<false>, scores_any<true>, grad_any,
                                                               scores_packed, grad_packed};

}  // namespace trl_fast
