// The two row kernels for CUDA; what they compute is specified by trl_fast/ops/head/row_kernels.py.
//
// A logit is read once, sixteen bytes at a time. row_scores goes through a row in chunks of 2048 columns, of which
// each thread has eight. It keeps the online sums of the columns that it sees, and the block merges them at the end of
// the row, so that a row of any length needs the same few registers and no more shared memory than one entry per warp.
// Which thread sees which columns, and in which order, does not depend on where the row lies: the same logits give the
// same bits. Row offsets are 64-bit. No torch headers: the same source compiles as host C++ (tests/support/simt.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/packs.cuh"
#include "packed_logits.h"
#include "row_types.h"

namespace trl_fast {
namespace {

// row_grad loads so many packs before it stores one: `out` may be the logits, so the compiler cannot reorder them.
constexpr int kBatch = 2;
// Columns of a chunk that a thread of row_scores has: sixteen bytes of a 16-bit type, twice that of float32.
constexpr int kShare = kPackedChunk / kThreads;
constexpr float kLog2e = 1.4426950408889634f;

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

// Whether packs can be read, or written, from the row's first column on, and nothing is left at its end.
template <typename T>
__device__ bool has_whole_shares(const T* row, int columns) {
  return columns % kShare == 0 && misplaced_bytes(row) == 0;
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

// What a thread has of a chunk.
template <typename T>
struct Share {
  static constexpr int kPackSize = Pack<T>::kSize;
  Pack<T> packs[kShare / kPackSize];

  __device__ T& operator[](int k) { return packs[k / kPackSize][k % kPackSize]; }
  __device__ T operator[](int k) const { return packs[k / kPackSize][k % kPackSize]; }
};

// Columns [first, first + kShare) of a row, as far as there are such; kWhole: all or none.
template <bool kWhole, typename T>
__device__ Share<T> load_share(const T* row, int first, int columns) {
  Share<T> share{};
  if constexpr (kWhole) {
    if (first < columns) share = *reinterpret_cast<const Share<T>*>(row + first);
  } else {
    for (int k = 0; k < kShare; ++k) {
      if (first + k < columns) share[k] = row[first + k];
    }
  }
  return share;
}

template <bool kWhole, typename T>
__device__ void store_share(T* row, int first, int columns, const Share<T>& share) {
  if constexpr (kWhole) {
    if (first < columns) *reinterpret_cast<Share<T>*>(row + first) = share;
  } else {
    for (int k = 0; k < kShare; ++k) {
      if (first + k < columns) row[first + k] = share[k];
    }
  }
}

// The row's target as a column of this tile; -1 or `columns` if it lies before or behind.
__device__ inline int local_target(const LogitTile& tile, int64_t row) {
  const int64_t target = tile.targets[row] - tile.column_offset;
  return static_cast<int>(target < 0 ? -1 : target < tile.columns ? target : tile.columns);
}

struct Logit {
  float u;
  float derivative;  // du/dz
};

// From raw values to logits, with the constants multiplied out.
template <typename T, bool kBias, bool kSoftcap>
struct Transformed {
  const float* bias;
  float inner;
  float outer;
  float derivative;

  __device__ explicit Transformed(const Transform& t)
      : bias(t.bias),
        inner(kSoftcap ? t.scale / t.softcap : 0.0f),
        outer(t.softcap * t.inv_temperature),
        derivative(t.scale * t.inv_temperature) {}

  __device__ Logit operator()(T raw, int column) const {
    float z = to_float(raw);
    if constexpr (kBias) z += bias[column];
    if constexpr (!kSoftcap) return {product(z, derivative), derivative};
    const float tanh = tanhf(z * inner);
    return {product(outer, tanh), derivative * (1.0f - tanh * tanh)};
  }
};

// Sums over the columns seen but for the target, relative to the largest logit among them; those of the state that
// row_statistics.py has.
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
  sums.sum_x = factor * fmaf(shift, sums.sum, sums.sum_x);
  sums.sum *= factor;
  sums.sum_sq *= factor * factor;
  sums.top = top;
}

// Adds the logits of columns [first, first + kShare); the target's and those that are not there are -inf.
template <int kOutputs>
__device__ void add(Online& sums, const float (&u)[kShare], int first, int target) {
  float top = u[0];
  for (int i = 1; i < kShare; ++i) top = maximum(top, u[i]);
  if constexpr (kOutputs & kIsTop1) {
    if (first + kShare <= target) {
      sums.before = maximum(sums.before, top);
    } else if (first < target) {
      for (int i = 0; i < kShare; ++i) sums.before = maximum(sums.before, first + i < target ? u[i] : -INFINITY);
    }
  }
  if (!(top <= sums.top)) raise(sums, top);  // true of NaN
  const float anchor = sums.top == -INFINITY ? 0.0f : sums.top;
  for (int i = 0; i < kShare; ++i) {
    const float x = u[i] - anchor;
    const float e = exp_flushed(x);
    sums.sum += e;
    if constexpr (kOutputs & kEntropy) sums.sum_x += e > 0.0f ? product(e, x) : e;  // not 0 * -inf
    if constexpr (kOutputs & kLogSumSqProbs) sums.sum_sq = fmaf(e, e, sums.sum_sq);
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

// The block's row: its sums are added to its state. keep(start, u) is given a thread's logits of the chunk that begins
// at column `start`, -inf for the target's, which goes to the state. kOutputs are the sums that are kept up, a
// superset of those that the caller asked for.
template <typename T, bool kBias, bool kSoftcap, int kOutputs, bool kWhole, typename Keep>
__device__ void score_row(const ScoreArgs& args, const T* logits, Keep keep) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(args.tile.columns), thread = threadIdx.x;
  const int target = local_target(args.tile, row);
  const Transformed<T, kBias, kSoftcap> transformed(args.transform);
  Online sums = nothing_seen();
  int first = thread * kShare;
  Share<T> next = load_share<kWhole>(logits, first, columns);
#pragma unroll 1
  for (int start = 0; start < columns; start += kPackedChunk, first += kPackedChunk) {
    const Share<T> share = next;
    next = load_share<kWhole>(logits, first + kPackedChunk, columns);  // on its way while this one is worked on
    float u[kShare];
    for (int k = 0; k < kShare; ++k) {
      const bool there = kWhole ? first < columns : first + k < columns;
      u[k] = there ? transformed(share[k], first + k).u : -INFINITY;
      if constexpr (kOutputs & kMeanLogits) sums.total += there ? u[k] : 0.0f;
    }
    if (target >= first && target < first + kShare) {
      for (int k = 0; k < kShare; ++k) u[k] = first + k == target ? -INFINITY : u[k];
    }
    add<kOutputs>(sums, u, first, target);
    keep(start, u);
  }
  sums = merged_block(sums);
  if (thread != 0) return;
  double* state = args.state + row;
  add_to_state(sums, kOutputs & args.outputs, state, args.state_stride);
  if (target >= 0 && target < columns) state[kTarget * args.state_stride] = transformed(logits[target], target).u;
}

// The row of raw logits that belongs to this block.
template <typename T>
__device__ const T* logits_of_block(const LogitTile& tile) {
  return static_cast<const T*>(tile.logits) + blockIdx.x * tile.row_stride;
}

// One block a row.
template <typename T, bool kBias, bool kSoftcap, int kOutputs>
__global__ void __launch_bounds__(kThreads) row_scores_kernel(ScoreArgs args) {
  const T* logits = logits_of_block<T>(args.tile);
  const auto keep_nothing = [](int, const float (&)[kShare]) {};
  if (has_whole_shares(logits, static_cast<int>(args.tile.columns))) {
    score_row<T, kBias, kSoftcap, kOutputs, true>(args, logits, keep_nothing);
  } else {
    score_row<T, kBias, kSoftcap, kOutputs, false>(args, logits, keep_nothing);
  }
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
    return (is_target ? d : du) * logit.derivative;
  }
};

// Blocks (row, part of its columns). Each element depends on itself only, so `out` may be the logits.
template <typename T, typename Out, bool kBias, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) row_grad_kernel(GradArgs args) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(args.tile.columns);
  const T* logits = logits_of_block<T>(args.tile);
  Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
  const int target = local_target(args.tile, row);
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
void with_tile_and_transform(const LogitTile& tile, const Transform& transform, Visit visit) {
  with_dtype(tile.dtype, [&](auto value) {
    with_flag(transform.bias != nullptr,
              [&](auto bias) { with_flag(transform.softcap != 0.0f, [&](auto cap) { visit(value, bias, cap); }); });
  });
}

// Calls visit with the sums to keep up, an int as a type. Three instances, not sixteen: the combinations that trainers
// ask for, and one for all others.
template <typename Visit>
void with_outputs(int64_t outputs, Visit visit) {
  constexpr int kEverything = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;
  if (outputs == 0) return visit(std::integral_constant<int, 0>{});
  if (outputs == kEntropy) return visit(std::integral_constant<int, kEntropy>{});
  visit(std::integral_constant<int, kEverything>{});
}

// Calls launch(kernel, grid) with the instance that serves `args`; all of these do nothing for an empty tile.
template <typename Launch>
void dispatch_scores(const ScoreArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.tile.columns == 0) return;
  const dim3 grid(static_cast<unsigned>(rows));
  with_tile_and_transform(args.tile, args.transform, [&](auto value, auto bias, auto cap) {
    with_outputs(args.outputs, [&](auto outputs) {
      constexpr bool kBias = decltype(bias)::value, kCap = decltype(cap)::value;
      launch(row_scores_kernel<decltype(value), kBias, kCap, decltype(outputs)::value>, grid);
    });
  });
}

template <typename Launch>
void dispatch_grad(const GradArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.tile.columns == 0) return;
  const dim3 grid(static_cast<unsigned>(rows), grad_parts(args.tile.columns, args.tile.dtype));
  with_tile_and_transform(args.tile, args.transform, [&](auto value, auto bias, auto cap) {
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
