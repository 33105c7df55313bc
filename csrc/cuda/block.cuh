// Defines the shape of a block of threads and reductions over one, for every CUDA kernel. No torch headers: the same
// source compiles as host C++ (tests/support/simt.h).
#pragma once

#include <cmath>

namespace trl_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float warp_sum(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// Returns the sum over the block, to the threads of the first warp.
__device__ inline float block_sum(float value) {
  __shared__ float of_warp[kWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  value = warp_sum(value);
  __syncthreads();  // a sum before this one has been read
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  return warp == 0 ? warp_sum(lane < kWarps ? of_warp[lane] : 0.0f) : 0.0f;
}

// Returns the largest number of the block, to every thread; NaN counts as none. Call it with `parity` 0 and 1 in turn:
// when one parity writes its shared memory again, the other's barrier has seen that every thread has read from it.
__device__ inline float block_maximum(float x, int parity) {
  __shared__ float of_warp[2][kWarps];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  if (threadIdx.x % kWarpSize == 0) of_warp[parity][threadIdx.x / kWarpSize] = x;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) x = fmaxf(x, of_warp[parity][warp]);
  return x;
}

}  // namespace
}  // namespace trl_fast
