// Defines what every CUDA kernel on rows of numbers has: sixteen bytes of them, conversions, a product by itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace trl_fast {
namespace {

// What one load or store moves: sixteen bytes, or the eight that they become in a narrower type. It travels as words:
// as an array of halves it would be taken apart and put together again.
template <typename T, int kCount = sizeof(uint4) / sizeof(T)>
struct Pack {
  static constexpr int kSize = kCount;
  std::conditional_t<kCount * sizeof(T) == sizeof(uint4), uint4, uint2> words;

  __device__ T& operator[](int k) { return reinterpret_cast<T*>(&words)[k]; }
  __device__ T operator[](int k) const { return reinterpret_cast<const T*>(&words)[k]; }
};

// Stores sixteen bytes of global memory at once: a pack that is made number by number would be stored in four pieces.
__device__ inline void store_words(void* to, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = words;
#endif
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }

// A product that the compiler fuses with no sum: a number must be the same wherever it is used, and rounded where
// PyTorch rounds it.
__device__ inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace
}  // namespace trl_fast
