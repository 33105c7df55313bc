// A float vector as wide as the instruction set, on the compiler's vector extensions, with the few functions we need.
//
// Everything lives in an unnamed namespace: this header is compiled once per instruction set, and no instance may leak
// from one translation unit into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kWidth = 16;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HVec __attribute__((vector_size(2 * kWidth)));

constexpr float kInf = std::numeric_limits<float>::infinity();

// x - 0 is x for every x, as 0 + x is not for -0: the compiler leaves it out.
inline Vec splat(float x) { return x - Vec{}; }

template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

// a > b ? a : b and a < b ? a : b: the second one, if one of them is NaN.
#if defined(CPU_CAPABILITY_AVX512)
// GCC 12 makes two instructions of the comparisons.
inline Vec maximum(Vec a, Vec b) {
  return bits_as<Vec>(_mm512_maskz_max_ps(0xffff, bits_as<__m512>(a), bits_as<__m512>(b)));
}
inline Vec minimum(Vec a, Vec b) {
  return bits_as<Vec>(_mm512_maskz_min_ps(0xffff, bits_as<__m512>(a), bits_as<__m512>(b)));
}
#else
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
#endif

// In halves: a chain of log2(kWidth) steps.
template <typename T, typename F>
inline T folded(Vec x, F f) {
  T lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = x[i];
  for (int n = kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] = f(lanes[i], lanes[i + n]);
  }
  return lanes[0];
}

inline float max_of(Vec x) {
  return folded<float>(x, [](float a, float b) { return b > a ? b : a; });
}

inline double sum_of(Vec x) {
  return folded<double>(x, [](double a, double b) { return a + b; });
}

// mantissa * 2^n; `shifted` has n in its low bits.
#if defined(CPU_CAPABILITY_AVX512)
inline Vec times_power(Vec mantissa, Vec n, Vec) {
  return bits_as<Vec>(_mm512_maskz_scalef_ps(0xffff, bits_as<__m512>(mantissa), bits_as<__m512>(n)));
}
#else
inline Vec times_power(Vec mantissa, Vec, Vec shifted) {
  // Unsigned: the bits of what is no power of two, for NaN and far too small x, may overflow.
  return mantissa * bits_as<Vec>((bits_as<UVec>(shifted) << 23) + bits_as<UVec>(splat(1.0f)));
}
#endif

// e^x to about 1 ulp for x <= 88, to 2 ulp below -30: x = n ln2 + r, |r| <= ln2 / 2, a polynomial in r that is off by
// 3e-9 of e^r, times 2^n. -inf and everything below the normal range give 0; NaN stays NaN.
inline Vec exp_vec(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
  const Vec shifted = x * splat(1.44269504088896341f) + magic;
  const Vec n = shifted - magic;
  const Vec r = x - n * splat(0.693147180559945309f);
  Vec p = splat(1.3814583654e-3f) * r + splat(8.3687240258e-3f);
  p = p * r + splat(4.1668388993e-2f);
  p = p * r + splat(1.6666521132e-1f);
  p = p * r + splat(4.9999994040e-1f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  return x < splat(-87.3f) ? Vec{} : times_power(p, n, shifted);
}

// e^x for -87.3 <= x <= 88.6 alone: the exponent is added in place. Other x, and NaN, give any number.
inline Vec times_power_of_two(Vec mantissa, Vec shifted) {
  return bits_as<Vec>(bits_as<UVec>(mantissa) + (bits_as<UVec>(shifted) << 23));
}

// To about 1 ulp: x = n ln2 + r, |r| <= ln2 / 2, polynomial in r (Cephes expf).
inline Vec exp_between(const float*, Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x * splat(1.44269504088896341f) + magic;
  const Vec n = shifted - magic;
  const Vec r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
  const Vec r2 = r * r;
  // In pairs of terms: a chain of additions half as long.
  Vec p = splat(1.9875691500e-4f) * r + splat(1.3981999507e-3f);
  p = p * r2 + (splat(8.3334519073e-3f) * r + splat(4.1665795894e-2f));
  p = p * r2 + (splat(1.6666665459e-1f) * r + splat(5.0000001201e-1f));
  return times_power_of_two(p * r2 + r + splat(1.0f), shifted);
}

// For what is rounded to 16 bits afterwards, to 1e-5: e^x = 2^n 2^f, |f| <= 1 / 2, minimax polynomial in f.
inline Vec exp_between(const uint16_t*, Vec x) {
  const Vec magic = splat(12582912.0f), log2_of_e = splat(1.44269504088896341f);
  const Vec shifted = x * log2_of_e + magic;
  const Vec f = x * log2_of_e - (shifted - magic);
  Vec p = splat(9.57009667e-3f) * f + splat(5.59178599e-2f);
  p = p * (f * f) + (splat(2.4024745e-1f) * f + splat(6.93121815e-1f));
  return times_power_of_two(p * f + splat(0.999999261f), shifted);
}

struct Tanh {
  Vec value, derivative;
};

// tanh to about 2 ulp: a polynomial near 0 (Cephes tanhf), where 1 - d, d = 2 / (e^2|x| + 1), would cancel, that form
// elsewhere. The derivative 1 - tanh^2 would cancel there: it is d (2 - d).
inline Tanh tanh_vec(Vec x) {
  const Vec magnitude = x < Vec{} ? -x : x;
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  const Vec near = p * z * x + x;
  const Vec twice = magnitude > splat(40.0f) ? splat(80.0f) : magnitude + magnitude;
  const Vec distance = splat(2.0f) / (exp_vec(twice) + splat(1.0f));
  const Vec far = splat(1.0f) - distance;
  const Vec with_sign = x < Vec{} ? -far : far;
  const auto is_near = magnitude < splat(0.625f);
  const Vec value = is_near ? near : with_sign;
  const Vec derivative = is_near ? splat(1.0f) - near * near : distance * (splat(2.0f) - distance);
  return {x == x ? value : x, x == x ? derivative : x};
}

// ---- narrow dtypes

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec widen(const float* p) { return load(p); }

#if defined(CPU_CAPABILITY_AVX512)
// The masked forms, all lanes on: GCC 12 warns of an uninitialised variable inside its own unmasked ones.
inline Vec widen(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bits_as<Vec>(bits_as<UVec>(_mm512_maskz_cvtepu16_epi32(0xffff, h)) << 16);
}
inline void store_halves(void* p, UVec low) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, bits_as<__m512i>(low)));
}
#else
inline Vec widen(const BFloat16* p) {
  HVec h;
  std::memcpy(&h, p, sizeof(h));
  return bits_as<Vec>(__builtin_convertvector(h, UVec) << 16);
}
// The low halves of 32-bit numbers.
inline void store_halves(void* p, UVec low) {
  const HVec h = __builtin_convertvector(low, HVec);
  std::memcpy(p, &h, sizeof(h));
}
#endif

inline Vec narrowed(const float*, Vec x) { return x; }
inline void narrow(float* p, Vec x) { store(p, x); }

// Numbers whose upper halves are x rounded to bfloat16, to nearest even; the lower halves are left over. Of NaN, only
// those stay NaN of which a lower half is not full of ones, as those of instructions and of bfloat16 numbers are.
inline UVec rounded_bits(Vec x) {
  const UVec u = bits_as<UVec>(x);
#if defined(CPU_CAPABILITY_AVX512)
  // 0x7fff and the last bit that stays, as the two halves of (u & 0x10000) | 0x7fff, which one instruction adds.
  const __m512i halves =
      _mm512_ternarylogic_epi32(bits_as<__m512i>(u), _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
  return u + bits_as<UVec>(_mm512_madd_epi16(halves, _mm512_set1_epi16(1)));
#else
  return u + 0x7fffu + ((u >> 16) & 1u);
#endif
}

// The same, but every NaN becomes the quiet one.
inline UVec bfloat16_bits(Vec x) {
  const UVec rounded = rounded_bits(x);
  return x == x ? rounded : UVec{} + 0x7fc00000u;
}

inline void narrow(BFloat16* p, Vec x) { store_halves(p, bfloat16_bits(x) >> 16); }

// Two vectors of numbers that lie together, in the order in which their type is widened fastest.
struct VecPair {
  Vec a, b;
};

template <typename T>
inline VecPair widen_pair(const T* p) {
  return {widen(p), widen(p + kWidth)};
}
// Even and odd places: no number changes its half of a register twice.
inline VecPair widen_pair(const BFloat16* p) {
  UVec both;
  std::memcpy(&both, p, sizeof(both));
  return {bits_as<Vec>(both << 16), bits_as<Vec>(both & 0xffff0000u)};
}

// Narrows what widen_pair gave in its order.
template <typename T>
inline void narrow_pair(T* p, VecPair x) {
  narrow(p, x.a);
  narrow(p + kWidth, x.b);
}
inline void narrow_pair(BFloat16* p, VecPair x) {
  const UVec both = (bfloat16_bits(x.a) >> 16) | (bfloat16_bits(x.b) & 0xffff0000u);
  std::memcpy(p, &both, sizeof(both));
}

#if defined(CPU_CAPABILITY_AVX512)
inline Vec widen(const Float16* p) {
  return bits_as<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline HVec narrowed(const Float16*, Vec x) {
  const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bits_as<HVec>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(x), mode));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec widen(const Float16* p) {
  return bits_as<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline HVec narrowed(const Float16*, Vec x) {
  return bits_as<HVec>(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without conversion instructions: by exponent arithmetic. 2^112 moves a half's exponent to a float's, and subnormal
// halves come out right because the multiplication normalises them.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  if ((h & 0x7c00u) == 0x7c00u) return bits_as<float>(sign | rest | 0x7f800000u);
  const float magnitude = bits_as<float>(rest) * 5.192296858534828e33f;
  return bits_as<float>(sign | bits_as<uint32_t>(magnitude));
}

inline uint16_t float_to_half(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 lets the float adder round to multiples of 2^-24.
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_as<uint32_t>(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return sign | static_cast<uint16_t>(rounded >> 13);
}

inline Vec widen(const Float16* p) {
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = half_to_float(p[i].bits);
  return x;
}
inline HVec narrowed(const Float16*, Vec x) {
  HVec h;
  for (int i = 0; i < kWidth; ++i) h[i] = float_to_half(x[i]);
  return h;
}
#endif

inline void narrow(Float16* p, Vec x) {
  const HVec h = narrowed(p, x);
  std::memcpy(p, &h, sizeof(h));
}

// Rounds to a dtype and widens again; NaN as rounded_bits says.
inline Vec rounded_to(const float*, Vec x) { return x; }
inline Vec rounded_to(const BFloat16*, Vec x) { return bits_as<Vec>(rounded_bits(x) & 0xffff0000u); }
inline Vec rounded_to(const Float16*, Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bits_as<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(x), mode)));
#elif defined(CPU_CAPABILITY_AVX2)
  return bits_as<Vec>(_mm256_cvtph_ps(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT)));
#else
  Float16 narrowed[kWidth];
  narrow(narrowed, x);
  return widen(narrowed);
#endif
}

}  // namespace
