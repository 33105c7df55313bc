// What the kernels of layers share: rows of strided tensors, room for numbers, sums. Like simd.h it lives in an
// unnamed namespace, once per translation unit.
#pragma once

#include <new>
#include <utility>

#include "layer_kernels.h"
#include "layer_vectors.h"

namespace {

// Room for numbers, with whole pairs of vectors that lie in one cache line each. A std::vector of floats would be one
// type for all instruction sets, and the linker would keep the code of any of them.
template <typename T>
class Room {
 public:
  explicit Room(int64_t size)
      : numbers_(static_cast<T*>(::operator new(padded_to_two(size) * sizeof(T), std::align_val_t{64}))) {
    std::memset(numbers_, 0, padded_to_two(size) * sizeof(T));
  }
  Room(const Room&) = delete;
  ~Room() { ::operator delete(numbers_, std::align_val_t{64}); }
  T* data() const { return numbers_; }

 private:
  T* numbers_;
};

// The sum of a vector's numbers, in pairs: short rows would wait for a chain of additions.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <int... kPlaces>
inline float sum_in_pairs(Vec x, std::integer_sequence<int, kPlaces...>) {
  x += __builtin_shufflevector(x, x, ((kPlaces + kWidth / 2) % kWidth)...);
  x += __builtin_shufflevector(x, x, ((kPlaces + kWidth / 4) % kWidth)...);
  if constexpr (kWidth > 4) x += __builtin_shufflevector(x, x, ((kPlaces + kWidth / 8) % kWidth)...);
  if constexpr (kWidth > 8) x += __builtin_shufflevector(x, x, ((kPlaces + kWidth / 16) % kWidth)...);
  return x[0];
}
inline float sum_in_pairs(Vec x) { return sum_in_pairs(x, std::make_integer_sequence<int, kWidth>{}); }
#else
inline float sum_in_pairs(Vec x) {
  float parts[kWidth];
  store(parts, x);
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}
#endif
inline float sum_in_pairs(Two x) { return sum_in_pairs(x.a + x.b); }

template <typename T>
inline const T* row_of(const trl_fast::Rows& rows, int64_t r) {
  const int64_t outer = r / rows.sizes[1], inner = r % rows.sizes[1];
  const int64_t offset = outer / rows.sizes[0] * rows.strides[0] + outer % rows.sizes[0] * rows.strides[1];
  return static_cast<const T*>(rows.data) + offset + inner * rows.strides[2];
}

// Calls a function with a null pointer of the C++ type of a dtype.
template <typename F>
inline void with_type(trl_fast::Dtype dtype, F f) {
  switch (dtype) {
    case trl_fast::Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case trl_fast::Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case trl_fast::Dtype::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

}  // namespace
