// What the kernels of one instruction set share: rows in chunks that stay in the first-level cache. Like simd.h it
// lives in an unnamed namespace, once per translation unit.
#pragma once

#include <algorithm>

#include "row_kernels.h"
#include "simd.h"

#define TRL_FAST_JOIN_(a, b) a##b
#define TRL_FAST_JOIN(a, b) TRL_FAST_JOIN_(a, b)

namespace {

constexpr int64_t kChunk = 2048;  // floats; a multiple of every vector width
static_assert(kChunk % kWidth == 0);

int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// Calls f(i, k) for the vectors of a chunk, k being 0 and 1 in turn: two sums that do not wait for each other.
template <typename F>
inline void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth < n; i += 2 * kWidth) {
    f(i, 0);
    f(i + kWidth, 1);
  }
  if (i < n) f(i, 0);
}

// Widens n values; the rest of the last vector becomes `padding`.
template <typename T>
void widen_chunk(const T* from, int64_t n, float padding, float* to) {
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(to + i, widen(from + i));
  if (whole == n) return;
  T last[kWidth] = {};
  std::memcpy(last, from + whole, (n - whole) * sizeof(T));
  store(to + whole, widen(last));
  for (int64_t i = n; i < padded(n); ++i) to[i] = padding;
}

// The first n values of a vector, or all of it.
template <typename T>
inline void narrow_part(Vec from, int64_t n, T* to) {
  if (n >= kWidth) return narrow(to, from);
  T part[kWidth];
  narrow(part, from);
  std::memcpy(to, part, n * sizeof(T));
}

template <typename T>
void narrow_chunk(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kWidth) narrow_part(load(from + i), n - i, to + i);
}

// Raw logits of columns [start, start + n), transformed in place; the derivative du/dz goes to `derivative` unless
// null. The rest of the last vector becomes -inf: a softcap has made it finite, a negative scale +inf.
void transform_chunk(const trl_fast::Transform& t, int64_t start, int64_t n, float* u, float* derivative) {
  if (t.bias) {
    for (int64_t i = 0; i < n; ++i) u[i] += t.bias[start + i];
  }
  const Vec scale = splat(t.scale), inv_temperature = splat(t.inv_temperature);
  if (t.softcap == 0.0f) {
    if (t.scale != 1.0f || t.inv_temperature != 1.0f) {
      for (int64_t i = 0; i < n; i += kWidth) store(u + i, load(u + i) * scale * inv_temperature);
    }
    if (derivative) std::fill(derivative, derivative + padded(n), t.scale * t.inv_temperature);
  } else {
    const Vec cap = splat(t.softcap), inv_cap = splat(1.0f / t.softcap);
    for (int64_t i = 0; i < n; i += kWidth) {
      const Tanh tanh = tanh_vec(load(u + i) * scale * inv_cap);
      store(u + i, cap * tanh.value * inv_temperature);
      if (derivative) store(derivative + i, tanh.derivative * scale * inv_temperature);
    }
  }
  for (int64_t i = n; i < padded(n); ++i) u[i] = -kInf;
}

template <typename T>
void logits_chunk(const T* row, const trl_fast::Transform& t, int64_t start, int64_t n, float* u,
                  float* derivative = nullptr) {
  widen_chunk(row + start, n, -kInf, u);
  transform_chunk(t, start, n, u, derivative);
}

}  // namespace
