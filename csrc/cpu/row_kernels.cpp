// The row kernels of one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// A tile's row is read once: in chunks that stay in the first-level cache, where a chunk is widened to float,
// transformed, and then read as often as need be. Sums run in vector lanes within a chunk and in double across chunks.
#include "row_kernels.h"

#include <algorithm>

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

template <typename Row>
float derivative_at(const Row& row, const Transform& t, int64_t column) {
  float u[kWidth], derivatives[kWidth];
  logits_chunk(row, t, column, 1, u, derivatives);
  return derivatives[0];
}

// Online sums of a row without its target, relative to their running maximum m: s = sum e^(u-m),
// sx = sum e^(u-m) (u-m), sq = sum e^2(u-m).
struct Online {
  float m = -kInf;
  double s = 0, sx = 0, sq = 0, total = 0;

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
};

float chunk_max(const float* u, int64_t n) {
  Vec best[2] = {splat(-kInf), splat(-kInf)};
  for_vectors(n, [&](int64_t i, int k) { best[k] = maximum(load(u + i), best[k]); });
  return max_of(maximum(best[0], best[1]));
}

// With kWeights, `u` becomes e^(u-m).
template <bool kMoments, bool kWeights>
void add_chunk(float* u, int64_t n, Online& online) {
  const Vec m = splat(online.m);
  Vec s[2] = {}, sx[2] = {}, sq[2] = {};
  for_vectors(n, [&](int64_t i, int k) {
    const Vec x = load(u + i) - m;
    const Vec e = exp_vec(x);
    s[k] += e;
    if constexpr (kWeights) store(u + i, e);
    if constexpr (kMoments) {
      sx[k] += e > Vec{} ? e * x : e;  // not 0 * -inf
      sq[k] += e * e;
    }
  });
  online.s += sum_of(s[0]) + sum_of(s[1]);
  if constexpr (kMoments) {
    online.sx += sum_of(sx[0]) + sum_of(sx[1]);
    online.sq += sum_of(sq[0]) + sum_of(sq[1]);
  }
}

double chunk_total(const float* u, int64_t n) {
  Vec total = {};
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) total += load(u + i);
  double sum = sum_of(total);
  for (int64_t i = whole; i < n; ++i) sum += u[i];
  return sum;
}

// The largest logit of a tile's row but for its target; `u` is scratch.
template <typename T>
float row_max(const T* row, const ScoreArgs& args, int64_t target, float* u) {
  const int64_t columns = args.tile.columns;
  float top = -kInf;
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    logits_chunk(row, args.transform, start, n, u);
    if (target >= start && target < start + n) u[target - start] = -kInf;
    top = std::max(top, chunk_max(u, n));
  }
  return top;
}

// The target's logit goes to the state; everything else sees -inf in its place. With kWeights, the row's
// e^(u - top) du/dz go to `weights`, relative to its largest logit with this tile; finding that takes a look ahead
// where the tile is wider than a chunk. `packed`, unless null, takes the logits.
template <typename T, bool kMoments, bool kWeights>
void score_row(const T* row, const ScoreArgs& args, int64_t target, double* state, T* weights,
               const PackedRow* packed) {
  using namespace trl_fast;
  alignas(64) float u[kChunk], derivative[kWeights ? kChunk : 1];
  const int64_t stride = args.state_stride, columns = args.tile.columns;
  const bool curved = kWeights && args.transform.softcap != 0.0f;
  const Vec constant_derivative = splat(args.transform.scale * args.transform.inv_temperature);
  Online online = {static_cast<float>(state[kTop * stride]), state[kSum * stride], state[kSumX * stride],
                   state[kSumSq * stride], state[kTotal * stride]};
  float before = static_cast<float>(state[kBefore * stride]);
  if (kWeights && columns > kChunk) online.raise(row_max(row, args, target, u));
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    logits_chunk(row, args.transform, start, n, u, curved ? derivative : nullptr);
    if (args.outputs & kMeanLogits) online.total += chunk_total(u, n);
    if (target >= start && target < start + n) {
      state[kTarget * stride] = u[target - start];
      u[target - start] = -kInf;
    }
    const float top = chunk_max(u, n);
    if (args.outputs & kIsTop1) {
      const int64_t earlier = std::clamp<int64_t>(target - start, 0, n);
      if (earlier == n) before = std::max(before, top);
      if (earlier > 0 && earlier < n) before = std::max(before, *std::max_element(u, u + earlier));
    }
    if (packed) pack_chunk(u, n, top, packed->chunk(start / kChunk));
    online.raise(top);
    // A chunk of nothing but -inf adds nothing; -inf - -inf would be NaN. But NaN has to be seen.
    const bool counts = online.m > -kInf || !std::all_of(u, u + n, [](float x) { return x == -kInf; });
    if (counts) add_chunk<kMoments, kWeights>(u, n, online);
    if constexpr (kWeights) {
      if (!counts) std::fill(u, u + padded(n), 0.0f);
      for (int64_t i = 0; i < n; i += kWidth) {
        const Vec weight = load(u + i) * (curved ? load(derivative + i) : constant_derivative);
        narrow_part(weight, n - i, weights + start + i);
      }
    }
  }
  state[kTop * stride] = online.m;
  state[kSum * stride] = online.s;
  state[kSumX * stride] = online.sx;
  state[kSumSq * stride] = online.sq;
  state[kTotal * stride] = online.total;
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
inline Vec logit_grad(Vec u, Vec lse, const RowCoefficients& c) {
  const Vec x = u - lse;
  const Vec p = exp_vec(x);
  if (c.b == 0.0f) return p * splat(c.a) + splat(c.e);
  const Vec product = p * (splat(c.a) + splat(c.b) * x);
  return (p == Vec{} ? Vec{} : product) + splat(c.e);
}

template <typename Row, typename T>
void grad_row(const Row& row, const GradArgs& args, float lse, int64_t target, const RowCoefficients& c, T* out) {
  alignas(64) float u[kChunk], derivative[kChunk];
  const int64_t columns = args.tile.columns;
  const bool has_target = target >= 0 && target < columns;
  // Before `out`, which may be `row`, is written.
  const float target_grad = has_target ? c.d * derivative_at(row, args.transform, target) : 0;
  const Vec lse_vec = splat(lse);
  const Vec constant_derivative = splat(args.transform.scale * args.transform.inv_temperature);
  const bool curved = args.transform.softcap != 0.0f;
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    logits_chunk(row, args.transform, start, n, u, curved ? derivative : nullptr);
    for (int64_t i = 0; i < n; i += kWidth) {
      const Vec grad = logit_grad(load(u + i), lse_vec, c) * (curved ? load(derivative + i) : constant_derivative);
      narrow_part(grad, n - i, out + start + i);
    }
  }
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
