// The two row kernels for CUDA; what they compute is specified by trl_fast/ops/rows.py.
//
// A logit is read once, sixteen bytes at a time. Each thread keeps the online sums of the columns that it sees, and
// the block merges them at the end of the row, so that a row of any length needs the same few registers and no more
// shared memory than one entry per warp. Row offsets are 64-bit. No torch headers: the same source compiles as host
// C++ (tests/support/simt.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/row_kernels.h"

namespace trl_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kWholeWarp = 0xffffffffu;
// row_grad loads so many packs before it stores one: `out` may be the logits, so the compiler cannot reorder them.
constexpr int kBatch = 2;
constexpr float kLog2e = 1.4426950408889634f;

// What one load or store moves: sixteen bytes, or the eight that they become in a narrower type. It travels as words:
// as an array of halves it would be taken apart and put together again.
template <typename T, int kCount = sizeof(uint4) / sizeof(T)>
struct Pack {
  static constexpr int kSize = kCount;
  std::conditional_t<kCount * sizeof(T) == sizeof(uint4), uint4, uint2> words;

  __device__ T& operator[](int k) { return reinterpret_cast<T*>(&words)[k]; }
  __device__ T operator[](int k) const { return reinterpret_cast<const T*>(&words)[k]; }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }

// CUDA's exp2f spends three more instructions on subnormal results, which are nothing next to a row's largest term.
__device__ inline float exp2_flushed(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

__device__ inline float exp_flushed(float x) { return exp2_flushed(x * kLog2e); }

// Unlike fmaxf, a NaN stays: a row that has one must not yield a number.
__device__ inline float maximum(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// A row's columns as whole packs at 16-byte boundaries and, before and after them, edges.
template <typename T>
struct Split {
  int head;
  int packs;
  int edges;

  __device__ int pack_column(int pack) const { return head + pack * Pack<T>::kSize; }
  __device__ int edge_column(int edge) const { return edge < head ? edge : edge + packs * Pack<T>::kSize; }
};

template <typename T>
__device__ int misplaced_bytes(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Pack<T>));
}

template <typename T>
__device__ Split<T> split_row(const T* row, int columns) {
  const int to_boundary = (sizeof(Pack<T>) - misplaced_bytes(row)) % sizeof(Pack<T>) / sizeof(T);
  const int head = to_boundary < columns ? to_boundary : columns;
  const int packs = (columns - head) / Pack<T>::kSize;
  return {head, packs, columns - packs * Pack<T>::kSize};
}

template <typename T>
__device__ const Pack<T>* packs_of(const T* row, const Split<T>& split) {
  return reinterpret_cast<const Pack<T>*>(row + split.head);
}

// The row's target as a column of this tile; -1 or `columns` if it lies before or behind.
__device__ inline int local_target(const Block& block, int64_t row) {
  const int64_t target = block.targets[row] - block.column_offset;
  return static_cast<int>(target < 0 ? -1 : target < block.columns ? target : block.columns);
}

struct Logit {
  float u;
  float slope;  // du/dz
};

// From raw values to logits, with the constants multiplied out.
template <typename T, bool kBias, bool kSoftcap>
struct Transformed {
  const float* bias;
  float inner;
  float outer;
  float slope;

  __device__ explicit Transformed(const Transform& t)
      : bias(t.bias),
        inner(kSoftcap ? t.scale / t.softcap : 0.0f),
        outer(t.softcap * t.inv_temperature),
        slope(t.scale * t.inv_temperature) {}

  __device__ Logit operator()(T raw, int column) const {
    float z = to_float(raw);
    if constexpr (kBias) z += bias[column];
    if constexpr (!kSoftcap) return {z * slope, slope};
    const float tanh = tanhf(z * inner);
    return {outer * tanh, slope * (1.0f - tanh * tanh)};
  }
};

// Sums over the columns seen, relative to the largest logit among them; those of rows.py's state.
struct Online {
  float top;
  float sum;
  float sum_x;
  float sum_sq;
  float total;
  float before;
};

__device__ inline Online nothing_seen() { return {-INFINITY, 0.0f, 0.0f, 0.0f, 0.0f, -INFINITY}; }

// By how much the sums' exponents fall; before anything is seen there is nothing to shift, and -inf - -inf is NaN.
__device__ inline float shift_to(float top, float new_top) { return top == -INFINITY ? 0.0f : top - new_top; }

__device__ inline void raise(Online& sums, float top) {
  const float shift = shift_to(sums.top, top);
  const float factor = exp_flushed(shift);
  sums.sum_x = factor * (sums.sum_x + shift * sums.sum);
  sums.sum *= factor;
  sums.sum_sq *= factor * factor;
  sums.top = top;
}

// Adds the logits of columns [first, first + kCount).
template <int kOutputs, int kCount>
__device__ void add(Online& sums, const float (&u)[kCount], int first, int target) {
  float top = u[0];
  for (int i = 1; i < kCount; ++i) top = maximum(top, u[i]);
  if constexpr (kOutputs & kIsTop1) {
    if (first + kCount <= target) {
      sums.before = maximum(sums.before, top);
    } else if (first < target) {
      for (int i = 0; i < kCount; ++i) sums.before = maximum(sums.before, first + i < target ? u[i] : -INFINITY);
    }
  }
  if (!(top <= sums.top)) raise(sums, top);  // true of NaN
  const float anchor = sums.top == -INFINITY ? 0.0f : sums.top;
  for (int i = 0; i < kCount; ++i) {
    const float x = u[i] - anchor;
    const float e = exp_flushed(x);
    sums.sum += e;
    if constexpr (kOutputs & kEntropy) sums.sum_x += e > 0.0f ? e * x : e;  // not 0 * -inf
    if constexpr (kOutputs & kLogSumSqProbs) sums.sum_sq += e * e;
    if constexpr (kOutputs & kMeanLogits) sums.total += u[i];
  }
}

__device__ inline Online merged(Online a, Online b) {
  const float top = maximum(a.top, b.top);
  raise(a, top);
  raise(b, top);
  return {top, a.sum + b.sum, a.sum_x + b.sum_x, a.sum_sq + b.sum_sq, a.total + b.total, maximum(a.before, b.before)};
}

template <int kLanes>
__device__ Online merged_lanes(Online sums) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sums = merged(
        sums, {__shfl_xor_sync(kWholeWarp, sums.top, distance), __shfl_xor_sync(kWholeWarp, sums.sum, distance),
               __shfl_xor_sync(kWholeWarp, sums.sum_x, distance), __shfl_xor_sync(kWholeWarp, sums.sum_sq, distance),
               __shfl_xor_sync(kWholeWarp, sums.total, distance), __shfl_xor_sync(kWholeWarp, sums.before, distance)});
  }
  return sums;
}

// The sums of the whole block, in the first warp. Once a kernel: a second call would need a barrier before it.
__device__ inline Online merged_block(Online sums) {
  __shared__ Online of_warp[kWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  sums = merged_lanes<kWarpSize>(sums);
  if (lane == 0) of_warp[warp] = sums;
  __syncthreads();
  if (warp != 0) return sums;
  sums = of_warp[lane % kWarps];
  return merged_lanes<kWarps>(sums);
}

// Adds a tile's sums to the float64 state of its row; only what the caller asked for is touched.
__device__ inline void add_to_state(const Online& tile, int64_t outputs, double* state, int64_t stride) {
  const float seen = static_cast<float>(state[kTop * stride]);
  const float top = maximum(seen, tile.top);
  const float shift = shift_to(seen, top), tile_shift = shift_to(tile.top, top);
  const double factor = exp_flushed(shift), tile_factor = exp_flushed(tile_shift);
  const double sum = state[kSum * stride];
  state[kTop * stride] = top;
  state[kSum * stride] = factor * sum + tile_factor * tile.sum;
  if (outputs & kEntropy) {
    double& sum_x = state[kSumX * stride];
    sum_x = factor * (sum_x + shift * sum) + tile_factor * (tile.sum_x + tile_shift * tile.sum);
  }
  if (outputs & kLogSumSqProbs) {
    double& sum_sq = state[kSumSq * stride];
    sum_sq = factor * factor * sum_sq + tile_factor * tile_factor * tile.sum_sq;
  }
  if (outputs & kMeanLogits) state[kTotal * stride] += tile.total;
  if (outputs & kIsTop1) {
    double& before = state[kBefore * stride];
    before = maximum(static_cast<float>(before), tile.before);
  }
}

// One block a row. kOutputs are the sums that are kept up, a superset of those that the caller asked for.
template <typename T, bool kBias, bool kSoftcap, int kOutputs>
__global__ void __launch_bounds__(kThreads) row_scores_kernel(ScoreArgs args) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(args.block.columns), thread = threadIdx.x;
  const T* logits = static_cast<const T*>(args.block.logits) + row * args.block.row_stride;
  const int target = local_target(args.block, row);
  const Transformed<T, kBias, kSoftcap> transformed(args.transform);
  const Split<T> split = split_row(logits, columns);
  Online sums = nothing_seen();
  if (thread < split.edges) {  // there are fewer than two packs of them
    const int column = split.edge_column(thread);
    add<kOutputs, 1>(sums, {transformed(logits[column], column).u}, column, target);
  }
  const Pack<T>* packs = packs_of(logits, split);
  Pack<T> next;
  if (thread < split.packs) next = packs[thread];
#pragma unroll 1
  for (int i = thread; i < split.packs; i += kThreads) {
    const Pack<T> pack = next;
    if (i + kThreads < split.packs) next = packs[i + kThreads];  // on its way while this one is worked on
    const int first = split.pack_column(i);
    float u[Pack<T>::kSize];
    for (int k = 0; k < Pack<T>::kSize; ++k) u[k] = transformed(pack[k], first + k).u;
    add<kOutputs>(sums, u, first, target);
  }
  sums = merged_block(sums);
  if (thread != 0) return;
  double* state = args.state + row;
  add_to_state(sums, kOutputs & args.outputs, state, args.state_stride);
  if (target >= 0 && target < columns) state[kTarget * args.state_stride] = transformed(logits[target], target).u;
}

struct Coefficients {
  float a, b, d, e;
  float lse;

  __device__ Coefficients(const GradArgs& args, int64_t row)
      : a(args.coefficients[row]),
        b(args.coefficients[row + args.coefficient_stride]),
        d(args.coefficients[row + 2 * args.coefficient_stride]),
        e(args.coefficients[row + 3 * args.coefficient_stride]),
        lse(args.lse[row]) {}

  __device__ float grad(const Logit& logit, bool is_target) const {
    const float x = logit.u - lse;
    const float p = exp_flushed(x);
    const float du = (p == 0.0f ? 0.0f : p * (a + b * x)) + e;
    return (is_target ? du + d : du) * logit.slope;
  }
};

// Blocks (row, part of its columns). Each element depends on itself only, so `out` may be the logits.
template <typename T, typename Out, bool kBias, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) row_grad_kernel(GradArgs args) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(args.block.columns);
  const T* logits = static_cast<const T*>(args.block.logits) + row * args.block.row_stride;
  Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
  const int target = local_target(args.block, row);
  const Transformed<T, kBias, kSoftcap> transformed(args.transform);
  const Coefficients coefficients(args, row);
  const auto grad_at = [&](T raw, int column, Out& to) {
    narrow(coefficients.grad(transformed(raw, column), column == target), to);
  };
  using OutPack = Pack<Out, Pack<T>::kSize>;
  Split<T> split = split_row(logits, columns);
  // A pack has to lie at a boundary in both.
  if (reinterpret_cast<uintptr_t>(out + split.head) % sizeof(OutPack) != 0) split = {columns, 0, columns};
#pragma unroll 1
  for (int edge = blockIdx.y * kThreads + threadIdx.x; edge < split.edges; edge += gridDim.y * kThreads) {
    const int column = split.edge_column(edge);
    grad_at(logits[column], column, out[column]);
  }
  const Pack<T>* from = packs_of(logits, split);
  OutPack* to = reinterpret_cast<OutPack*>(out + split.head);
  const int first = blockIdx.y * kBatch * kThreads + threadIdx.x;
  Pack<T> batch[kBatch];
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    if (first + k * kThreads < split.packs) batch[k] = from[first + k * kThreads];
  }
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const int i = first + k * kThreads;
    if (i >= split.packs) break;
    OutPack grads;
    for (int j = 0; j < Pack<T>::kSize; ++j) grad_at(batch[k][j], split.pack_column(i) + j, grads[j]);
    to[i] = grads;
  }
}

// Blocks along a row for row_grad, each with one batch a thread.
inline unsigned grad_parts(int64_t columns, Dtype dtype) {
  const int64_t columns_of_block = int64_t{kThreads} * kBatch * (dtype == Dtype::kFloat32 ? 4 : 8);
  return static_cast<unsigned>((columns + columns_of_block - 1) / columns_of_block);
}

template <typename Visit>
void with_dtype(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::kFloat32:
      return visit(float{});
    case Dtype::kBFloat16:
      return visit(__nv_bfloat16{});
    case Dtype::kFloat16:
      return visit(__half{});
  }
}

template <typename Visit>
void with_flag(bool flag, Visit visit) {
  flag ? visit(std::true_type{}) : visit(std::false_type{});
}

// Calls visit(dtype's value, has bias, has softcap), the flags as std::true_type or std::false_type.
template <typename Visit>
void with_block_and_transform(const Block& block, const Transform& transform, Visit visit) {
  with_dtype(block.dtype, [&](auto value) {
    with_flag(transform.bias != nullptr,
              [&](auto bias) { with_flag(transform.softcap != 0.0f, [&](auto cap) { visit(value, bias, cap); }); });
  });
}

// Calls launch(kernel, grid) with the instance that serves `args`; both do nothing for an empty tile.
template <typename Launch>
void dispatch_scores(const ScoreArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.block.columns == 0) return;
  constexpr int kEverything = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;
  const dim3 grid(static_cast<unsigned>(rows));
  with_block_and_transform(args.block, args.transform, [&](auto value, auto bias, auto cap) {
    using T = decltype(value);
    constexpr bool kBias = decltype(bias)::value, kCap = decltype(cap)::value;
    // Three instances, not sixteen: the combinations that trainers ask for, and one for all others.
    if (args.outputs == 0) {
      launch(row_scores_kernel<T, kBias, kCap, 0>, grid);
    } else if (args.outputs == kEntropy) {
      launch(row_scores_kernel<T, kBias, kCap, kEntropy>, grid);
    } else {
      launch(row_scores_kernel<T, kBias, kCap, kEverything>, grid);
    }
  });
}

template <typename Launch>
void dispatch_grad(const GradArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.block.columns == 0) return;
  const dim3 grid(static_cast<unsigned>(rows), grad_parts(args.block.columns, args.block.dtype));
  with_block_and_transform(args.block, args.transform, [&](auto value, auto bias, auto cap) {
    using T = decltype(value);
    constexpr bool kBias = decltype(bias)::value, kCap = decltype(cap)::value;
    with_dtype(args.out_dtype, [&](auto grad) {
      using Out = decltype(grad);
      if constexpr (std::is_same_v<T, Out> || std::is_same_v<T, float>) {
        launch(row_grad_kernel<T, Out, kBias, kCap>, grid);
      }
    });
  });
}

}  // namespace
}  // namespace trl_fast
