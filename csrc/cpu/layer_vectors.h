// Two vectors of a row's numbers at once. Like simd.h this lives in an unnamed namespace, once per translation unit.
//
// Of bfloat16, a vector of 32-bit words holds the numbers of even places in its lower halves and those of odd places
// in its upper halves: a shift and a mask widen both, and no number has to change places. So rows of bfloat16 are
// computed on in that order, "by pairs"; float32 numbers that go with them (weights, angles, sums) are put in it
// beforehand.
#pragma once

#include <type_traits>
#include <utility>

#include "row_chunks.h"

// GCC makes a function, whose arguments go through memory, of a longer lambda that is called in several places.
#define TRL_FAST_INLINE __attribute__((always_inline))

namespace {

struct Two {
  Vec a, b;
};
constexpr int64_t kTwo = 2 * kWidth;

TRL_FAST_INLINE inline Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
TRL_FAST_INLINE inline Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
TRL_FAST_INLINE inline Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
TRL_FAST_INLINE inline Two operator*(Two x, float y) { return {x.a * splat(y), x.b * splat(y)}; }

TRL_FAST_INLINE inline Two load_two(const float* p) { return {load(p), load(p + kWidth)}; }

TRL_FAST_INLINE inline void store_two(float* p, Two x) {
  store(p, x.a);
  store(p + kWidth, x.b);
}

// A store that the compiler leaves in its place among others of this kind: rows that are written backwards, be it in
// pairs of vectors, are written up to a tenth slower. (An empty asm between stores would keep them in place, too, but
// GCC then keeps pairs of vectors in memory.)
template <typename V>
TRL_FAST_INLINE inline void store_in_order(void* p, V x) {
  typedef V Anywhere __attribute__((aligned(2), may_alias));
  *static_cast<volatile Anywhere*>(p) = x;
}

// Numbers that fill whole pairs of vectors.
inline int64_t padded_to_two(int64_t n) { return (n + kTwo - 1) / kTwo * kTwo; }

// ---- orders

template <typename T>
constexpr bool kByPairs = std::is_same_v<T, BFloat16>;

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <int... kPlaces>
TRL_FAST_INLINE inline Two split_pairs(Two x, std::integer_sequence<int, kPlaces...>) {
  return {__builtin_shufflevector(x.a, x.b, (2 * kPlaces)...),
          __builtin_shufflevector(x.a, x.b, (2 * kPlaces + 1)...)};
}
template <int... kPlaces>
TRL_FAST_INLINE inline Two join_pairs(Two x, std::integer_sequence<int, kPlaces...>) {
  return {__builtin_shufflevector(x.a, x.b, (kPlaces / 2 + kPlaces % 2 * kWidth)...),
          __builtin_shufflevector(x.a, x.b, ((kPlaces + kWidth) / 2 + kPlaces % 2 * kWidth)...)};
}
#else
template <int... kPlaces>
inline Two split_pairs(Two x, std::integer_sequence<int, kPlaces...>) {
  float both[kTwo];
  store_two(both, x);
  return {Vec{both[2 * kPlaces]...}, Vec{both[2 * kPlaces + 1]...}};
}
template <int... kPlaces>
inline Two join_pairs(Two x, std::integer_sequence<int, kPlaces...>) {
  float both[kTwo];
  for (int i = 0; i < kWidth; ++i) {
    both[2 * i] = x.a[i];
    both[2 * i + 1] = x.b[i];
  }
  return load_two(both);
}
#endif

// Numbers as they lie in memory, or by pairs, put in one of these orders.
template <bool kFromPairs, bool kToPairs>
TRL_FAST_INLINE inline Two reordered(Two x) {
  constexpr std::make_integer_sequence<int, kWidth> places{};
  if constexpr (kToPairs && !kFromPairs) return split_pairs(x, places);
  if constexpr (kFromPairs && !kToPairs) return join_pairs(x, places);
  return x;
}

// ---- dtypes

// Rounds to the dtype.
template <typename T>
TRL_FAST_INLINE inline Vec rounded(Vec x) {
  return rounded_to(static_cast<const T*>(nullptr), x);
}
template <typename T>
TRL_FAST_INLINE inline Two rounded(Two x) {
  return {rounded<T>(x.a), rounded<T>(x.b)};
}

// A whole pair of vectors, where a function takes the number of values that are there.
struct Whole {};

template <typename T>
TRL_FAST_INLINE inline Two widen_two(const T* p, Whole) {
  if constexpr (kByPairs<T>) {
    UVec words;
    std::memcpy(&words, p, sizeof(words));
    return {bits_as<Vec>(words << 16), bits_as<Vec>(words & 0xffff0000u)};
  } else {
    return {widen(p), widen(p + kWidth)};
  }
}

// NaN stays NaN as rounded_to says.
template <typename T>
TRL_FAST_INLINE inline void narrow_two(T* p, Two x, Whole) {
  if constexpr (kByPairs<T>) {
    const UVec words = (rounded_bits(x.a) >> 16) | (rounded_bits(x.b) & 0xffff0000u);
    std::memcpy(p, &words, sizeof(words));
  } else {
    store_in_order(p, narrowed(p, x.a));
    store_in_order(p + kWidth, narrowed(p, x.b));
  }
}

// The first n < kTwo values, zeros after them.
template <typename T>
inline Two widen_two(const T* p, int64_t n) {
  T part[kTwo] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return widen_two(part, Whole{});
}
template <typename T>
inline void narrow_two(T* p, Two x, int64_t n) {
  T part[kTwo];
  narrow_two(part, x, Whole{});
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// How far ahead memory is fetched that is read, or written, from one end to the other: two pages. The CPU's own
// prefetching ends at a page, and stores wait in order for lines of memory, so that few are fetched at once.
constexpr int64_t kAhead = 8192;

template <typename T>
TRL_FAST_INLINE inline void fetch_two(const T* p, int64_t ahead) {
  for (int64_t i = 0; i < kTwo * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead + i));
  }
}

// widen_two and narrow_two of such memory. Kernels that read and write float32 at memory's rate are up to a sixth
// slower if they fetch what they write, too; those that are further from that rate do so themselves.
template <typename T, typename N>
TRL_FAST_INLINE inline Two read_two(const T* p, N n, int64_t ahead = kAhead) {
  fetch_two(p, ahead);
  return widen_two(p, n);
}
template <typename T, typename N>
TRL_FAST_INLINE inline void write_two(T* p, Two x, N n, int64_t ahead = kAhead) {
  if constexpr (sizeof(T) == 2) fetch_two(p, ahead);
  narrow_two(p, x, n);
}

template <typename T>
TRL_FAST_INLINE inline void copy_two(const T* from, T* to, Whole) {
  std::memcpy(to, from, kTwo * sizeof(T));
}
template <typename T>
inline void copy_two(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}

// Of n pairs of numbers that lie side by side, the numbers in the first kTwo places and in the next kTwo.
TRL_FAST_INLINE inline Whole first_of_two(Whole n) { return n; }
TRL_FAST_INLINE inline Whole second_of_two(Whole n) { return n; }
inline int64_t first_of_two(int64_t n) { return std::min(2 * n, kTwo); }
inline int64_t second_of_two(int64_t n) { return std::max<int64_t>(2 * n - kTwo, 0); }

// ---- rows

// Calls f(i, n) for the pairs of vectors of a row, n being Whole or the number of values in the last one.
template <typename F>
TRL_FAST_INLINE inline void for_row(int64_t columns, F f) {
  int64_t i = 0;
  for (; i + kTwo <= columns; i += kTwo) f(i, Whole{});
  if (i < columns) f(i, columns - i);
}

// Writes n numbers widened and in an order, and zeros that fill the last pair of vectors up.
template <bool kToPairs, typename T>
inline void widen_row(const T* from, int64_t n, float* to) {
  for_row(n, [&](int64_t i, auto count)
                 TRL_FAST_INLINE { store_two(to + i, reordered<kByPairs<T>, kToPairs>(widen_two(from + i, count))); });
}

}  // namespace
