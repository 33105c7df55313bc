// Rotary embeddings of heads for CUDA, alone and after a norm of each head; trl_fast/ops/layers specifies them.
//
// A row, one head of one token, belongs to kHeadLanes threads; each has packs of pairs, and packs of the numbers that
// pass. What a norm reads a second time comes from the cache of the multiprocessor: a row has a few hundred bytes.
// Angles are those of the token, and its heads have them from the cache too. Gradients by a norm's weight are summed
// by workers, as in layer_kernels.cuh. Offsets are 64-bit.
#pragma once

#include "cuda/layer_kernels.cuh"

namespace trl_fast {
namespace {

constexpr int kHeadLanes = 8;
// Packs of pairs, and of numbers that pass, of which a thread keeps sums of the weight's gradient in registers.
constexpr int kPairPacks = 2, kRestPacks = 3;

// Batch, head and token of a row; rows go by batch, token and head.
struct HeadPlace {
  int64_t batch, head, token;
};

__device__ inline HeadPlace head_place(const Heads& heads, int64_t row) {
  // Counts of rows, unlike offsets, are 32-bit numbers, of which a quotient costs less.
  const unsigned r = static_cast<unsigned>(row), num_heads = static_cast<unsigned>(heads.heads);
  const unsigned place = r / num_heads, num_tokens = static_cast<unsigned>(heads.tokens);
  return {place / num_tokens, r % num_heads, place % num_tokens};
}

__device__ inline int64_t head_offset(const int64_t (&strides)[3], const HeadPlace& at) {
  return at.batch * strides[0] + at.head * strides[1] + at.token * strides[2];
}

template <int kSize>
struct PairValues {
  float a[kSize], b[kSize];
};

// Pairs [first, first + kSize) of a row, as far as there are such.
template <bool kWhole, typename T, int kSize>
__device__ inline PairValues<kSize> load_pairs(const T* row, int64_t half, int64_t first, bool adjacent) {
  PairValues<kSize> pairs;
  if (!adjacent) {
    load_values<kWhole>(row, first, half, pairs.a);
    load_values<kWhole>(row + half, first, half, pairs.b);
    return pairs;
  }
  float both[2 * kSize];
  load_values<kWhole>(row, 2 * first, 2 * half, both);
  for (int k = 0; k < kSize; ++k) {
    pairs.a[k] = both[2 * k];
    pairs.b[k] = both[2 * k + 1];
  }
  return pairs;
}

template <bool kWhole, typename T, int kSize>
__device__ inline void store_pairs(const PairValues<kSize>& pairs, int64_t half, int64_t first, bool adjacent,
                                   T* row) {
  if (!adjacent) {
    store_values<kWhole>(pairs.a, first, half, row);
    store_values<kWhole>(pairs.b, first, half, row + half);
    return;
  }
  float both[2 * kSize];
  for (int k = 0; k < kSize; ++k) {
    both[2 * k] = pairs.a[k];
    both[2 * k + 1] = pairs.b[k];
  }
  store_values<kWhole>(both, 2 * first, 2 * half, row);
}

__device__ inline bool reads_adjacent(const Turns& turns) {
  return turns.pairs == Pairs::kAdjacent || (turns.pairs == Pairs::kAdjacentToHalves && !turns.is_backward);
}

__device__ inline bool writes_adjacent(const Turns& turns) {
  return turns.pairs == Pairs::kAdjacent || (turns.pairs == Pairs::kAdjacentToHalves && turns.is_backward);
}

template <bool kWhole, typename T, int kSize>
__device__ inline PairValues<kSize> load_angles(const Turns& turns, const T* row, int64_t first) {
  const int64_t half = turns.width / 2;
  if (!turns.one_angle_a_pair) {
    return load_pairs<kWhole, T, kSize>(row, half, first, turns.pairs != Pairs::kHalves);
  }
  PairValues<kSize> angles;
  load_values<kWhole>(row, first, half, angles.a);
  for (int k = 0; k < kSize; ++k) angles.b[k] = angles.a[k];
  return angles;
}

template <bool kWhole, typename T, int kSize>
__device__ inline PairValues<kSize> angles_of(const Turns& turns, const void* from, const int64_t (&strides)[2],
                                              const HeadPlace& at, int64_t first) {
  const int64_t offset = at.batch * strides[0] + at.token * strides[1];
  if (turns.dtype == Dtype::kFloat32) {
    return load_angles<kWhole, float, kSize>(turns, static_cast<const float*>(from) + offset, first);
  }
  return load_angles<kWhole, T, kSize>(turns, static_cast<const T*>(from) + offset, first);
}

// (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b); backward it is (a cos_a + b sin_b, b cos_b - a sin_a).
template <bool kWhole, typename T, int kSize>
__device__ inline PairValues<kSize> turned(const Turns& turns, const HeadPlace& at, PairValues<kSize> x,
                                           int64_t first) {
  const PairValues<kSize> cos = angles_of<kWhole, T, kSize>(turns, turns.cos, turns.cos_strides, at, first);
  const PairValues<kSize> sin = angles_of<kWhole, T, kSize>(turns, turns.sin, turns.sin_strides, at, first);
  const auto times = [&](float left, float right) {
    return turns.upcast ? product(left, right) : rounded<T>(product(left, right));
  };
  for (int k = 0; k < kSize; ++k) {
    const float a = x.a[k], b = x.b[k];
    const float sin_a = turns.is_backward ? -sin.b[k] : sin.a[k], sin_b = turns.is_backward ? -sin.a[k] : sin.b[k];
    x.a[k] = times(a, cos.a[k]) - times(b, sin_a);
    x.b[k] = times(b, cos.b[k]) + times(a, sin_b);
  }
  return x;
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) rotary_kernel(RotaryArgs args, int64_t rows) {
  constexpr int kSize = Pack<T>::kSize;
  const Turns& turns = args.turns;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kHeadLanes) + threadIdx.x / kHeadLanes;
  if (row >= rows) return;
  const HeadPlace at = head_place(args.heads, row);
  const T* x = static_cast<const T*>(args.heads.x) + head_offset(args.heads.x_strides, at);
  T* out = static_cast<T*>(args.out) + row * args.heads.width;
  const int64_t half = turns.width / 2, lane = threadIdx.x % kHeadLanes;
#pragma unroll 1
  for (int64_t first = lane * kSize; first < half; first += kHeadLanes * kSize) {
    const auto pairs = load_pairs<kWhole, T, kSize>(x, half, first, reads_adjacent(turns));
    store_pairs<kWhole>(turned<kWhole, T>(turns, at, pairs, first), half, first, writes_adjacent(turns), out);
  }
#pragma unroll 1
  for (int64_t i = turns.width + lane * kSize; i < args.heads.width; i += kHeadLanes * kSize) {
    float values[kSize];
    load_values<kWhole>(x, i, args.heads.width, values);
    store_values<kWhole>(values, i, args.heads.width, out);
  }
}

// Calls f(column of the first number, column of the second) for pair `pair` of a row.
template <typename F>
__device__ inline void with_columns(int64_t half, int64_t pair, bool adjacent, F f) {
  if (adjacent) return f(2 * pair, 2 * pair + 1);
  f(pair, half + pair);
}

// The factors of a norm for pairs [first, first + kSize).
template <bool kWhole, typename T, int kSize>
__device__ inline PairValues<kSize> pair_factors(const NormWeight& weight, int64_t half, int64_t first,
                                                 bool adjacent) {
  auto factors = load_pairs<kWhole, T, kSize>(static_cast<const T*>(weight.data), half, first, adjacent);
  const float more = weight.cast == NormCast::kGemma ? 1.0f : 0.0f;
  for (int k = 0; k < kSize; ++k) {
    factors.a[k] += more;
    factors.b[k] += more;
  }
  return factors;
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) norm_rotary_kernel(NormRotaryArgs args, int64_t rows) {
  constexpr int kSize = Pack<T>::kSize, kStep = kHeadLanes * kSize;
  const Turns& turns = args.turns;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kHeadLanes) + threadIdx.x / kHeadLanes;
  const bool has_row = row < rows;  // threads without one go along with their warp
  const int64_t width = args.heads.width, half = turns.width / 2, lane = threadIdx.x % kHeadLanes;
  const HeadPlace at = head_place(args.heads, has_row ? row : 0);
  const T* x = static_cast<const T*>(args.heads.x) + head_offset(args.heads.x_strides, at);
  float squares = 0.0f;
#pragma unroll 1
  for (int64_t i = lane * kSize; i < width; i += kStep) {
    float values[kSize];
    load_values<kWhole>(x, i, width, values);
    for (int k = 0; k < kSize; ++k) squares = fmaf(values[k], values[k], squares);
  }
  squares = lanes_sum<kHeadLanes>(squares, 0);
  if (!has_row) return;
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(width) + args.eps);
  if (lane == 0) args.rstd[row] = rstd;
  const bool first_rounded = rounds_first(args.norm);
  const auto normed = [&](float value, float factor) {
    const float n = product(value, rstd);
    return rounded<T>(product(first_rounded ? rounded<T>(n) : n, factor));
  };
  T* out = static_cast<T*>(args.out) + row * width;
#pragma unroll 1
  for (int64_t first = lane * kSize; first < half; first += kStep) {
    auto pairs = load_pairs<kWhole, T, kSize>(x, half, first, reads_adjacent(turns));
    const auto factors = pair_factors<kWhole, T, kSize>(args.norm, half, first, reads_adjacent(turns));
    for (int k = 0; k < kSize; ++k) {
      pairs.a[k] = normed(pairs.a[k], factors.a[k]);
      pairs.b[k] = normed(pairs.b[k], factors.b[k]);
    }
    store_pairs<kWhole>(turned<kWhole, T>(turns, at, pairs, first), half, first, writes_adjacent(turns), out);
  }
#pragma unroll 1
  for (int64_t i = turns.width + lane * kSize; i < width; i += kStep) {
    float values[kSize], factors[kSize];
    load_values<kWhole>(x, i, width, values);
    load_factors<kWhole, T>(args.norm, i, factors);
    for (int k = 0; k < kSize; ++k) values[k] = normed(values[k], factors[k]);
    store_values<kWhole>(values, i, width, out);
  }
}

// What a row's gradient goes through: turned back and rounded, then as in rms_norm_backward_kernel.
template <typename T, bool kWhole>
struct HeadBackward {
  static constexpr int kSize = Pack<T>::kSize;
  const NormRotaryArgs& args;
  HeadPlace at;
  const T* x;
  const T* grad;
  float rstd;
  bool first_rounded;

  __device__ HeadBackward(const NormRotaryArgs& args, int64_t row) : args(args), at(head_place(args.heads, row)) {
    x = static_cast<const T*>(args.heads.x) + head_offset(args.heads.x_strides, at);
    grad = static_cast<const T*>(args.grad) + head_offset(args.grad_strides, at);
    rstd = args.rstd[row];
    first_rounded = rounds_first(args.norm);
  }

  // Turns a value of x and the gradient by its result into n = x rstd and the gradient by n; returns that by the
  // weight.
  __device__ float through_norm(float factor, float& value, float& g) const {
    value = product(value, rstd);
    const float by_weight = product(g, first_rounded ? rounded<T>(value) : value), by = product(g, factor);
    g = first_rounded ? rounded<T>(by) : by;
    return by_weight;
  }

  // Calls f(n, gradient by n, gradient by the weight) of pairs [first, first + kSize).
  template <typename F>
  __device__ void pairs_at(int64_t first, F f) const {
    const Turns& turns = args.turns;
    const int64_t half = turns.width / 2;
    auto g =
        turned<kWhole, T>(turns, at, load_pairs<kWhole, T, kSize>(grad, half, first, reads_adjacent(turns)), first);
    auto values = load_pairs<kWhole, T, kSize>(x, half, first, writes_adjacent(turns));
    const auto factors = pair_factors<kWhole, T, kSize>(args.norm, half, first, writes_adjacent(turns));
    PairValues<kSize> by_weight;
    for (int k = 0; k < kSize; ++k) {
      g.a[k] = rounded<T>(g.a[k]);
      g.b[k] = rounded<T>(g.b[k]);
      by_weight.a[k] = through_norm(factors.a[k], values.a[k], g.a[k]);
      by_weight.b[k] = through_norm(factors.b[k], values.b[k], g.b[k]);
    }
    f(values, g, by_weight);
  }

  // The same of the numbers [i, i + kSize) that pass.
  template <typename F>
  __device__ void rest_at(int64_t i, F f) const {
    float values[kSize], g[kSize], factors[kSize], by_weight[kSize];
    load_values<kWhole>(x, i, args.heads.width, values);
    load_values<kWhole>(grad, i, args.heads.width, g);
    load_factors<kWhole, T>(args.norm, i, factors);
    for (int k = 0; k < kSize; ++k) by_weight[k] = through_norm(factors[k], values[k], g[k]);
    f(values, g, by_weight);
  }
};

// A worker's sums of the gradient by the weight: a thread's own columns, the first of them in registers, which takes
// loops that are unrolled; for some GPUs nvcc leaves them.
template <typename T>
struct HeadSums {
  static constexpr int kSize = Pack<T>::kSize;
  PairValues<kSize> pairs[kPairPacks] = {};
  float rest[kRestPacks][kSize] = {};

  __device__ static void add(float value, bool is_first, float& sum) { sum = (is_first ? 0.0f : sum) + value; }

  // index: of the thread's pack; is_first: of the worker's rows.
  __device__ void add_pairs(const PairValues<kSize>& more, int64_t index, int64_t first, int64_t half, bool adjacent,
                            bool is_first, float* partial) {
#pragma unroll
    for (int i = 0; i < kPairPacks; ++i) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (i != index) continue;
        pairs[i].a[k] += more.a[k];
        pairs[i].b[k] += more.b[k];
      }
    }
    for (int k = 0; k < kSize && index >= kPairPacks && first + k < half; ++k) {
      with_columns(half, first + k, adjacent, [&](int64_t a, int64_t b) {
        add(more.a[k], is_first, partial[a]);
        add(more.b[k], is_first, partial[b]);
      });
    }
  }

  __device__ void add_rest(const float (&more)[kSize], int64_t index, int64_t column, int64_t width, bool is_first,
                           float* partial) {
#pragma unroll
    for (int i = 0; i < kRestPacks; ++i) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (i == index) rest[i][k] += more[k];
      }
    }
    for (int k = 0; k < kSize && index >= kRestPacks && column + k < width; ++k) {
      add(more[k], is_first, partial[column + k]);
    }
  }

  __device__ void store(int64_t turned_width, int64_t width, bool adjacent, float* partial) const {
    const int64_t half = turned_width / 2, lane = threadIdx.x % kHeadLanes;
#pragma unroll
    for (int i = 0; i < kPairPacks; ++i) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int64_t pair = (i * kHeadLanes + lane) * kSize + k;
        if (pair >= half) continue;
        with_columns(half, pair, adjacent, [&](int64_t a, int64_t b) {
          partial[a] = pairs[i].a[k];
          partial[b] = pairs[i].b[k];
        });
      }
    }
#pragma unroll
    for (int i = 0; i < kRestPacks; ++i) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int64_t column = turned_width + (i * kHeadLanes + lane) * kSize + k;
        if (column < width) partial[column] = rest[i][k];
      }
    }
  }
};

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    norm_rotary_backward_kernel(NormRotaryArgs args, int64_t rows, int64_t workers) {
  constexpr int kSize = Pack<T>::kSize, kStep = kHeadLanes * kSize;
  const Turns& turns = args.turns;
  const int64_t width = args.heads.width, half = turns.width / 2, lane = threadIdx.x % kHeadLanes;
  const int64_t worker = int64_t{blockIdx.x} * (kThreads / kHeadLanes) + threadIdx.x / kHeadLanes;
  const bool adjacent = writes_adjacent(turns), has_partials = args.partials != nullptr && worker < workers;
  float* partial = args.partials + worker * width;
  HeadSums<T> sums;
  // Every thread makes as many rounds: those without a row go along with their warp.
  for (int64_t start = 0; start < rows; start += workers) {
    const int64_t row = start + worker;
    const bool has_row = worker < workers && row < rows;
    const HeadBackward<T, kWhole> at(args, has_row ? row : 0);
    float products = 0.0f;
#pragma unroll 1
    for (int64_t i = 0; has_row && lane * kSize + i * kStep < half; ++i) {
      const int64_t first = lane * kSize + i * kStep;
      at.pairs_at(first, [&](const auto& n, const auto& g, const auto& by_weight) {
        for (int k = 0; k < kSize; ++k) products += g.a[k] * n.a[k] + g.b[k] * n.b[k];
        if (has_partials) sums.add_pairs(by_weight, i, first, half, adjacent, start == 0, partial);
      });
    }
#pragma unroll 1
    for (int64_t i = 0; has_row && turns.width + lane * kSize + i * kStep < width; ++i) {
      const int64_t column = turns.width + lane * kSize + i * kStep;
      at.rest_at(column, [&](const auto& n, const auto& g, const auto& by_weight) {
        for (int k = 0; k < kSize; ++k) products += g[k] * n[k];
        if (has_partials) sums.add_rest(by_weight, i, column, width, start == 0, partial);
      });
    }
    products = lanes_sum<kHeadLanes>(products, 0);
    if (!has_row || args.out == nullptr) continue;
    const float mean = products / static_cast<float>(width);
    T* out = static_cast<T*>(args.out) + row * width;
#pragma unroll 1
    for (int64_t first = lane * kSize; first < half; first += kStep) {
      at.pairs_at(first, [&](const auto& n, auto g, const auto&) {
        for (int k = 0; k < kSize; ++k) {
          g.a[k] = at.rstd * (g.a[k] - n.a[k] * mean);
          g.b[k] = at.rstd * (g.b[k] - n.b[k] * mean);
        }
        store_pairs<kWhole>(g, half, first, adjacent, out);
      });
    }
#pragma unroll 1
    for (int64_t i = turns.width + lane * kSize; i < width; i += kStep) {
      at.rest_at(i, [&](const auto& n, auto& g, const auto&) {
        for (int k = 0; k < kSize; ++k) g[k] = at.rstd * (g[k] - n[k] * mean);
        store_values<kWhole>(g, i, width, out);
      });
    }
  }
  if (has_partials) sums.store(turns.width, width, adjacent, partial);
}

// Whether heads and angles can be read, and heads written, in packs.
template <typename T>
bool in_packs(const Heads& heads, const Turns& turns, const void* out) {
  constexpr int64_t kSize = Pack<T>::kSize;
  bool aligned = turns.width / 2 % kSize == 0 && is_aligned<T>(out, heads.width);
  for (int64_t stride : heads.x_strides) aligned = aligned && is_aligned<T>(heads.x, stride);
  const auto angles_are = [&](const void* data, const int64_t (&strides)[2]) {
    const auto in = [&](int64_t stride) {
      return turns.dtype == Dtype::kFloat32 ? is_aligned<float>(data, stride) : is_aligned<T>(data, stride);
    };
    return in(strides[0]) && in(strides[1]);
  };
  return aligned && angles_are(turns.cos, turns.cos_strides) && angles_are(turns.sin, turns.sin_strides);
}

template <typename Launch>
void dispatch_rotary(const RotaryArgs& args, int64_t rows, Launch launch) {
  if (rows * args.heads.width == 0) return;
  with_type(args.heads.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    const int64_t blocks = ceil_div(rows, kThreads / kHeadLanes);
    with_constant(in_packs<T>(args.heads, args.turns, args.out),
                  [&](auto whole) { launch(rotary_kernel<T, whole.value>, grid_of(blocks), args, rows); });
  });
}

template <typename Launch>
void dispatch_norm_rotary(const NormRotaryArgs& args, int64_t rows, Launch launch) {
  if (rows * args.heads.width == 0) return;
  with_type(args.heads.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    const int64_t blocks = ceil_div(rows, kThreads / kHeadLanes);
    with_constant(in_packs<T>(args.heads, args.turns, args.out) && is_aligned<T>(args.norm.data),
                  [&](auto whole) { launch(norm_rotary_kernel<T, whole.value>, grid_of(blocks), args, rows); });
  });
}

template <typename Launch>
void dispatch_norm_rotary_backward(const NormRotaryArgs& args, int64_t rows, int64_t workers, Launch launch) {
  if (rows * args.heads.width == 0) return;
  with_type(args.heads.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    const int64_t blocks = ceil_div(workers, kThreads / kHeadLanes);
    bool in_whole_packs = in_packs<T>(args.heads, args.turns, args.out) && is_aligned<T>(args.norm.data);
    for (int64_t stride : args.grad_strides) in_whole_packs = in_whole_packs && is_aligned<T>(args.grad, stride);
    with_constant(in_whole_packs, [&](auto whole) {
      launch(norm_rotary_backward_kernel<T, whole.value>, grid_of(blocks), args, rows, workers);
    });
  });
}

}  // namespace
}  // namespace trl_fast
