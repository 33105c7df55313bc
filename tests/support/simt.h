// Tests only: the part of CUDA's language that the kernels use, so that a .cuh file compiles as host C++.
//
//   g++ -std=c++20 -fno-strict-aliasing -I$CUDA_HOME/include [-fsanitize=thread | -fsanitize=address] test.cpp
//   simt::launch(grid, block, seed, [&] { kernel<float>(arguments); });
//
// Include it before the kernels. They see __CUDA_ARCH__ undefined, and take the plain C++ in place of PTX.
//
// Shared memory is poisoned and, with AddressSanitizer, guarded, for arrays in functions that are no templates: GCC 12
// ignores the section of a template's static variable.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "support/simt_scheduler.h"

#undef __shared__
#undef __launch_bounds__
#define __shared__ static __attribute__((section("simt_shared")))
#define __launch_bounds__(...)

inline void __syncthreads() { simt::wait_at_barrier(); }

template <typename T>
SIMT_UNINSTRUMENTED T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "simt: __shfl_xor_sync with mask %08x; only whole warps are simulated\n", mask);
    std::abort();
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simt::meet(bits)[(simt::running % simt::kLanes) ^ lane_mask];
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
