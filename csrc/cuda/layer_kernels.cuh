// RMSNorm and gated activations for CUDA; what they compute is specified by trl_fast/ops/layers.
//
// A row of a norm belongs to kLanes threads, which keep it in registers: it is read once, sixteen bytes at a time. Of
// rows that are too long for that, parts are read again. Gradients by a norm's weight are summed by workers, each of
// which takes its rows in order and leaves one row of sums: the same numbers give the same bits. Offsets are 64-bit.
#pragma once

#include <type_traits>

#include "cuda/layer_kernels.h"
#include "cuda/layer_rows.cuh"

namespace trl_fast {
namespace {

// What a norm is multiplied by at a column, in float32: the weight, one more for Gemma's; 1 without a weight.
template <bool kWhole, typename T, int kSize>
__device__ inline void load_factors(const NormWeight& weight, int64_t column, float (&to)[kSize]) {
  for (int k = 0; k < kSize; ++k) to[k] = 1.0f;
  if (weight.data == nullptr) return;
  load_values<kWhole>(static_cast<const T*>(weight.data), column, weight.columns, to);
  if (weight.cast != NormCast::kGemma) return;
  for (int k = 0; k < kSize; ++k) to[k] += 1.0f;
}

// Whether the normalised row is rounded before the product with the weight, and back the gradient behind it.
__device__ inline bool rounds_first(const NormWeight& weight) {
  return weight.data != nullptr && weight.cast == NormCast::kLlama;
}

// A thread's part of a row, of which the row's threads have a span at once.
template <typename T, int kLanes, int kPacks, bool kWhole>
struct Share {
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr int64_t kSpan = int64_t{kLanes} * kPacks * kSize;
  Pack<T> packs[kPacks];

  __device__ static int64_t column(int64_t start, int pack) {
    return start + (pack * kLanes + threadIdx.x % kLanes) * kSize;
  }

  __device__ void load(const T* row, int64_t start, int64_t columns) {
    for (int i = 0; i < kPacks; ++i) {
      const int64_t first = column(start, i);
      packs[i] = {};
      if constexpr (kWhole) {
        if (first < columns) packs[i] = *reinterpret_cast<const Pack<T>*>(row + first);
      } else {
        for (int k = 0; k < kSize; ++k) {
          if (first + k < columns) packs[i][k] = row[first + k];
        }
      }
    }
  }
};

template <typename T, int kLanes, int kPacks, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) rms_norm_kernel(NormArgs args) {
  using Part = Share<T, kLanes, kPacks, kWhole>;
  constexpr int kSize = Part::kSize;
  const int64_t columns = args.weight.columns;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  // Threads without a row go along with their block.
  const int64_t end = row < args.rows ? columns : 0, r = row < args.rows ? row : 0;
  const T* x = row_of<T>(args.x, r);
  const T* residual = args.residual.data ? row_of<T>(args.residual, r) : nullptr;
  T* sum = static_cast<T*>(args.sum) + r * columns;
  T* out = static_cast<T*>(args.out) + r * columns;
  Part part;
  float squares = 0.0f;
  for (int64_t start = 0; start < columns; start += Part::kSpan) {
    part.load(x, start, end);
    for (int i = 0; i < kPacks; ++i) {
      const int64_t column = Part::column(start, i);
      float values[kSize];
      for (int k = 0; k < kSize; ++k) values[k] = to_float(part.packs[i][k]);
      if (residual) {
        float more[kSize];
        load_values<kWhole>(residual, column, end, more);
        for (int k = 0; k < kSize; ++k) {
          narrow(values[k] + more[k], part.packs[i][k]);
          values[k] = to_float(part.packs[i][k]);
        }
        store_values<kWhole>(values, column, end, sum);
      }
      for (int k = 0; k < kSize; ++k) squares = fmaf(values[k], values[k], squares);
    }
  }
  squares = lanes_sum<kLanes>(squares, 0);
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(columns) + args.eps);
  if (threadIdx.x % kLanes == 0 && row < args.rows) args.rstd[row] = rstd;
  const bool first_rounded = rounds_first(args.weight);
  for (int64_t start = 0; start < end; start += Part::kSpan) {
    if (columns > Part::kSpan) part.load(residual ? sum : x, start, end);
    for (int i = 0; i < kPacks; ++i) {
      const int64_t column = Part::column(start, i);
      float factors[kSize], values[kSize];
      load_factors<kWhole, T>(args.weight, column, factors);
      for (int k = 0; k < kSize; ++k) {
        const float normed = product(to_float(part.packs[i][k]), rstd);
        values[k] = product(first_rounded ? rounded<T>(normed) : normed, factors[k]);
      }
      store_values<kWhole>(values, column, end, out);
    }
  }
}

// With g the gradient by the normalised row n = x rstd, the one by x is rstd (g - n mean(g n)). Every worker, kLanes
// threads, takes the rows behind its own number, `workers` apart.
template <typename T, int kLanes, int kPacks, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) rms_norm_backward_kernel(NormArgs args, int64_t workers) {
  using Part = Share<T, kLanes, kPacks, kWhole>;
  constexpr int kSize = Part::kSize;
  const int64_t columns = args.weight.columns;
  const int64_t worker = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool has_partials = args.partials != nullptr && worker < workers, fits = columns <= Part::kSpan;
  float* partial = args.partials + worker * columns;
  const bool first_rounded = rounds_first(args.weight);
  Part part, gradient;
  // In registers, as `part`, only where loops over packs are unrolled; for some GPUs nvcc leaves them.
  float by_weight[kPacks][kSize] = {};
  int parity = 0;
  // Every thread makes as many rounds: those without a row go along with their block.
  for (int64_t first = 0; first < args.rows; first += workers, parity ^= 1) {
    const int64_t row = first + worker;
    const bool has_row = worker < workers && row < args.rows;
    const int64_t end = has_row ? columns : 0, r = has_row ? row : 0;
    const T *x = row_of<T>(args.x, r), *grad = row_of<T>(args.grad, r);
    const T* grad_sum = args.grad_sum.data ? row_of<T>(args.grad_sum, r) : nullptr;
    T* out = args.out ? static_cast<T*>(args.out) + r * columns : nullptr;
    const float rstd = args.rstd[r];
    const auto by_normed = [&](float g, float factor) {
      const float by = product(g, factor);
      return first_rounded ? rounded<T>(by) : by;
    };
    float products = 0.0f;
    for (int64_t start = 0; start < columns; start += Part::kSpan) {
      part.load(x, start, end);
      gradient.load(grad, start, end);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int64_t column = Part::column(start, i);
        float factors[kSize];
        load_factors<kWhole, T>(args.weight, column, factors);
        for (int k = 0; k < kSize; ++k) {
          const float g = to_float(gradient.packs[i][k]), normed = product(to_float(part.packs[i][k]), rstd);
          products = fmaf(by_normed(g, factors[k]), normed, products);
          const float by = product(g, first_rounded ? rounded<T>(normed) : normed);
          if (fits) {
            by_weight[i][k] += by;
          } else if (has_partials && column + k < end) {
            partial[column + k] = (first == 0 ? 0.0f : partial[column + k]) + by;
          }
        }
      }
    }
    const float mean = lanes_sum<kLanes>(products, parity) / static_cast<float>(columns);
    for (int64_t start = 0; out != nullptr && start < end; start += Part::kSpan) {
      if (!fits) part.load(x, start, end);
      if (!fits) gradient.load(grad, start, end);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int64_t column = Part::column(start, i);
        float factors[kSize], values[kSize], more[kSize];
        load_factors<kWhole, T>(args.weight, column, factors);
        if (grad_sum) load_values<kWhole>(grad_sum, column, end, more);
        for (int k = 0; k < kSize; ++k) {
          const float normed = product(to_float(part.packs[i][k]), rstd);
          values[k] = rstd * (by_normed(to_float(gradient.packs[i][k]), factors[k]) - normed * mean);
          if (grad_sum) values[k] = rounded<T>(values[k]) + more[k];
        }
        store_values<kWhole>(values, column, end, out);
      }
    }
  }
  if (!has_partials || !fits) return;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    for (int k = 0; k < kSize; ++k) {
      const int64_t column = Part::column(0, i) + k;
      if (column < columns) partial[column] = by_weight[i][k];
    }
  }
}

struct Activated {
  float value, derivative;
};

// x sigmoid(z), with the derivative dz of z. Where the sigmoid is 0 or 1 it has no derivative: there x dz may be huge.
__device__ inline Activated times_sigmoid(float x, float z, float dz) {
  const float e = expf(-z), denominator = 1.0f + e, sigmoid = 1.0f / denominator;
  // e sigmoid is 1 - sigmoid, to the last bit where that is next to nothing.
  const float change = fabsf(z) > 88.0f ? 0.0f : x * dz * (e * sigmoid);
  return {x / denominator, sigmoid * (1.0f + change)};
}

// All threads take the same branch, and these kernels wait for memory.
__device__ inline Activated activated(Activation kind, float x) {
  if (kind == Activation::kSilu) return times_sigmoid(x, x, 1.0f);
  if (kind == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u)
    const float twice = 1.5957691216057308f, square = x * x;
    return times_sigmoid(x, twice * (x + 0.044715f * square * x), twice * (1.0f + 0.134145f * square));
  }
  const float below = 0.5f * (1.0f + erff(0.70710678118654752f * x));
  return {x * below, below + x * 0.3989422804014327f * expf(-0.5f * x * x)};
}

// A thread's row and its first column.
struct Place {
  int64_t row, column;
};

__device__ inline Place place_of(int blocks_a_row, int size) {
  const int64_t block = blockIdx.x % blocks_a_row;
  return {blockIdx.x / blocks_a_row, (block * kThreads + threadIdx.x) * size};
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) gate_kernel(GateArgs args, int blocks_a_row) {
  constexpr int kSize = Pack<T>::kSize;
  const Place at = place_of(blocks_a_row, kSize);
  if (at.column >= args.columns) return;
  float gates[kSize], ups[kSize];
  load_values<kWhole>(static_cast<const T*>(args.gate) + at.row * args.stride, at.column, args.columns, gates);
  load_values<kWhole>(static_cast<const T*>(args.up) + at.row * args.stride, at.column, args.columns, ups);
  for (int k = 0; k < kSize; ++k) gates[k] = rounded<T>(activated(args.activation, gates[k]).value) * ups[k];
  store_values<kWhole>(gates, at.column, args.columns, static_cast<T*>(args.out) + at.row * args.columns);
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) gate_backward_kernel(GateArgs args, int blocks_a_row) {
  constexpr int kSize = Pack<T>::kSize;
  const Place at = place_of(blocks_a_row, kSize);
  if (at.column >= args.columns) return;
  const int64_t from = at.row * args.stride, to = at.row * args.grad_stride;
  float grads[kSize], gates[kSize], ups[kSize];
  load_values<kWhole>(static_cast<const T*>(args.grad) + at.row * args.columns, at.column, args.columns, grads);
  load_values<kWhole>(static_cast<const T*>(args.gate) + from, at.column, args.columns, gates);
  load_values<kWhole>(static_cast<const T*>(args.up) + from, at.column, args.columns, ups);
  for (int k = 0; k < kSize; ++k) {
    const Activated act = activated(args.activation, gates[k]);
    gates[k] = rounded<T>(grads[k] * ups[k]) * act.derivative;
    ups[k] = grads[k] * rounded<T>(act.value);
  }
  store_values<kWhole>(gates, at.column, args.columns, static_cast<T*>(args.grad_gate) + to);
  store_values<kWhole>(ups, at.column, args.columns, static_cast<T*>(args.grad_up) + to);
}

// Whether all rows of a norm can be read and written in packs.
template <typename T>
bool in_packs(const NormArgs& args) {
  const void* dense[] = {args.weight.data, args.sum, args.out};
  bool aligned = is_aligned<T>(args.x);
  for (const Rows* rows : {&args.residual, &args.grad, &args.grad_sum}) aligned = aligned && is_aligned<T>(*rows);
  for (const void* data : dense) aligned = aligned && is_aligned<T>(data, args.weight.columns);
  return aligned;
}

// Calls f with the type of the rows, with the threads and the packs of a thread that a row of them needs, and with
// whether rows lie in packs; all as constants.
template <typename F>
void with_lanes(const NormArgs& args, F f) {
  with_type(args.weight.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    const int64_t packs = ceil_div(args.weight.columns, Pack<T>::kSize);
    const auto two = std::integral_constant<int, 2>{};
    const auto all = std::integral_constant<int, kThreads>{};
    if (!in_packs<T>(args)) return f(type, all, two, std::false_type{});
    if (packs <= 16 * 2) return f(type, std::integral_constant<int, 16>{}, two, std::true_type{});
    if (packs <= 64 * 2) return f(type, std::integral_constant<int, 64>{}, two, std::true_type{});
    if (packs <= kThreads * 2) return f(type, all, two, std::true_type{});
    f(type, all, std::integral_constant<int, 8>{}, std::true_type{});
  });
}

// Calls launch(kernel, grid, arguments...); these do nothing where there is nothing to compute.
template <typename Launch>
void dispatch_rms_norm(const NormArgs& args, Launch launch) {
  if (args.rows == 0) return;
  with_lanes(args, [&](auto type, auto lanes, auto packs, auto whole) {
    using T = type_of<decltype(type)>;
    const int64_t blocks = ceil_div(args.rows, kThreads / lanes.value);
    launch(rms_norm_kernel<T, lanes.value, packs.value, whole.value>, grid_of(blocks), args);
  });
}

template <typename Launch>
void dispatch_rms_norm_backward(const NormArgs& args, int64_t workers, Launch launch) {
  if (args.rows == 0) return;
  with_lanes(args, [&](auto type, auto lanes, auto packs, auto whole) {
    using T = type_of<decltype(type)>;
    const int64_t blocks = ceil_div(workers, kThreads / lanes.value);
    launch(rms_norm_backward_kernel<T, lanes.value, packs.value, whole.value>, grid_of(blocks), args, workers);
  });
}

// Rows that lie in a line are one row.
template <typename T, typename F>
void with_gate_rows(GateArgs args, int64_t rows, bool is_dense, F f) {
  if (is_dense) {
    args.columns *= rows;
    args.stride = args.grad_stride = args.columns;
    rows = 1;
  }
  const auto are_aligned = [&](const void* first, const void* second, int64_t stride) {
    return is_aligned<T>(first, rows > 1 ? stride : 0) && is_aligned<T>(second, rows > 1 ? stride : 0);
  };
  const bool whole = args.columns % Pack<T>::kSize == 0 && are_aligned(args.out, args.grad, args.columns) &&
                     are_aligned(args.gate, args.up, args.stride) &&
                     are_aligned(args.grad_gate, args.grad_up, args.grad_stride);
  const int64_t blocks_a_row = ceil_div(args.columns, int64_t{kThreads} * Pack<T>::kSize);
  with_constant(whole,
                [&](auto whole) { f(args, grid_of(rows * blocks_a_row), static_cast<int>(blocks_a_row), whole); });
}

template <typename Launch>
void dispatch_gated_activation(const GateArgs& args, int64_t rows, Launch launch) {
  if (rows * args.columns == 0) return;
  with_type(args.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    with_gate_rows<T>(args, rows, args.stride == args.columns,
                      [&](const GateArgs& given, dim3 grid, int blocks_a_row, auto whole) {
                        launch(gate_kernel<T, whole.value>, grid, given, blocks_a_row);
                      });
  });
}

template <typename Launch>
void dispatch_gated_activation_backward(const GateArgs& args, int64_t rows, Launch launch) {
  if (rows * args.columns == 0) return;
  with_type(args.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    with_gate_rows<T>(args, rows, args.stride == args.columns && args.grad_stride == args.columns,
                      [&](const GateArgs& given, dim3 grid, int blocks_a_row, auto whole) {
                        launch(gate_backward_kernel<T, whole.value>, grid, given, blocks_a_row);
                      });
  });
}

}  // namespace
}  // namespace trl_fast
