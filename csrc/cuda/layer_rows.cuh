// What the CUDA kernels of layers share: parts of rows, sums over the threads of a row. No torch headers: the same
// source compiles as host C++ (tests/support/simt.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/packs.cuh"
#include "layer_types.h"

namespace trl_fast {
namespace {

constexpr int kPackBytes = sizeof(uint4);

// Rounds to T.
template <typename T>
__device__ inline float rounded(float x) {
  T narrowed;
  narrow(x, narrowed);
  return to_float(narrowed);
}

// Where row r begins. Most tensors have their rows in a line, and need no division.
template <typename T>
__device__ inline const T* row_of(const Rows& rows, int64_t r) {
  int64_t offset = 0;
  if (r >= rows.sizes[1]) {
    const int64_t outer = r / rows.sizes[1];
    r %= rows.sizes[1];
    offset = outer / rows.sizes[0] * rows.strides[0] + outer % rows.sizes[0] * rows.strides[1];
  }
  return static_cast<const T*>(rows.data) + offset + r * rows.strides[2];
}

// Values [column, column + kSize) of a row, as far as there are such, zeros behind. kWhole: all of them are there or
// none, and they begin at a multiple of sixteen bytes.
template <bool kWhole, typename T, int kSize>
__device__ inline void load_values(const T* row, int64_t column, int64_t columns, float (&to)[kSize]) {
  static_assert(kSize % Pack<T>::kSize == 0);
  if constexpr (kWhole) {
    for (int i = 0; i < kSize; i += Pack<T>::kSize) {
      Pack<T> pack{};
      if (column < columns) pack = *reinterpret_cast<const Pack<T>*>(row + column + i);
      for (int k = 0; k < Pack<T>::kSize; ++k) to[i + k] = to_float(pack[k]);
    }
  } else {
    for (int k = 0; k < kSize; ++k) to[k] = column + k < columns ? to_float(row[column + k]) : 0.0f;
  }
}

template <bool kWhole, typename T, int kSize>
__device__ inline void store_values(const float (&from)[kSize], int64_t column, int64_t columns, T* row) {
  static_assert(kSize % Pack<T>::kSize == 0);
  if constexpr (kWhole) {
    for (int i = 0; i < kSize; i += Pack<T>::kSize) {
      Pack<T> pack;
      for (int k = 0; k < Pack<T>::kSize; ++k) narrow(from[i + k], pack[k]);
      if (column < columns) store_words(row + column + i, pack.words);
    }
  } else {
    for (int k = 0; k < kSize; ++k) {
      if (column + k < columns) narrow(from[k], row[column + k]);
    }
  }
}

// The sum of what the lanes of `warps` neighbouring warps bring, one number a warp, to all of them. The whole block
// has to call it, with `parity` 0 and 1 in turn, as block_maximum.
__device__ inline float warps_sum(float x, int warps, int parity) {
  __shared__ float of_warp[2][kWarps];
  const int warp = threadIdx.x / kWarpSize, first = warp / warps * warps;
  if (threadIdx.x % kWarpSize == 0) of_warp[parity][warp] = x;
  __syncthreads();
  x = 0.0f;
  for (int i = 0; i < warps; ++i) x += of_warp[parity][first + i];
  return x;
}

// The sum over the kLanes threads of a row, to all of them; kLanes is a part of a warp, or whole warps.
template <int kLanes>
__device__ inline float lanes_sum(float x, int parity) {
  for (int distance = (kLanes < kWarpSize ? kLanes : kWarpSize) / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  }
  if constexpr (kLanes > kWarpSize) x = warps_sum(x, kLanes / kWarpSize, parity);
  return x;
}

// Whether rows that begin at `data`, so many elements apart, begin at multiples of sixteen bytes.
template <typename T>
inline bool is_aligned(const void* data, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0 && stride * sizeof(T) % kPackBytes == 0;
}

template <typename T>
inline bool is_aligned(const Rows& rows) {
  return is_aligned<T>(rows.data, rows.strides[0]) && is_aligned<T>(rows.data, rows.strides[1]) &&
         is_aligned<T>(rows.data, rows.strides[2]);
}

// A type, as a value.
template <typename T>
struct Type {
  using type = T;
};

template <typename Value>
using type_of = typename Value::type;

// Calls f with the C++ type of a dtype.
template <typename F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Type<float>{});
    case Dtype::kBFloat16:
      return f(Type<__nv_bfloat16>{});
    case Dtype::kFloat16:
      return f(Type<__half>{});
  }
}

// Calls f with true or false as a constant.
template <typename F>
void with_constant(bool value, F f) {
  if (value) return f(std::true_type{});
  f(std::false_type{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

}  // namespace
}  // namespace trl_fast
