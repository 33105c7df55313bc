// Chunks of packed logits. Like vec.h this lives in an unnamed namespace, once per translation unit.
#pragma once

#include "chunks.h"
#include "packed_logits.h"

namespace {

static_assert(trl_fast::kPackedChunk == kChunk);

constexpr float kLowestCode = 65534.0f;  // steps; what lies further down is brought up to here
constexpr float kMinusInfCode = 65535.0f;
// A float of [2^23, 2^24) has its integer in the low bits: adding 2^23 rounds to it.
constexpr float kIntegers = 8388608.0f;

// No -inf but where the chunk has nothing else: -inf - -inf is NaN, and no number of steps below infinity.
inline HVec pack_vec(Vec u, Vec top) {
  const Vec steps = (top - u) * splat(1.0f / trl_fast::kPackedStep);
  const Vec limit = steps < splat(kInf) ? splat(kLowestCode) : splat(kMinusInfCode);
  const Vec code = steps < limit ? steps : limit;
  return __builtin_convertvector(bits_as<UVec>(code + splat(kIntegers)), HVec);
}

// Logits of n columns whose largest is `top`, padded to whole vectors.
void pack_chunk(const float* u, int64_t n, float top, uint16_t* packed) {
  std::memcpy(packed, &top, sizeof(top));
  packed += trl_fast::kPackedHeader;
  const Vec top_vec = splat(top);
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const HVec codes = pack_vec(load(u + i), top_vec);
    std::memcpy(packed + i, &codes, sizeof(codes));
  }
  if (whole == n) return;
  const HVec last = pack_vec(load(u + whole), top_vec);
  std::memcpy(packed + whole, &last, (n - whole) * sizeof(uint16_t));
}

// A word of a packed row.
struct Packed {
  uint16_t word;
};

inline Vec unpack_vec(const Packed* from, Vec top) {
  HVec codes;
  std::memcpy(&codes, from, sizeof(codes));
  const UVec integers = __builtin_convertvector(codes, UVec) | bits_as<UVec>(splat(kIntegers));
  const Vec code = bits_as<Vec>(integers) - splat(kIntegers);
  return code == splat(kMinusInfCode) ? splat(-kInf) : top - code * splat(trl_fast::kPackedStep);
}

// Logits of columns [start, start + n) of one chunk. They were transformed before they were packed, without a softcap.
inline void logits_chunk(const Packed* row, const trl_fast::Transform& t, int64_t start, int64_t n, float* u,
                         float* slope = nullptr) {
  const Packed* chunk = row + start / kChunk * (kChunk + trl_fast::kPackedHeader);
  float top;
  std::memcpy(&top, chunk, sizeof(top));
  const Vec top_vec = splat(top);
  const Packed* from = chunk + trl_fast::kPackedHeader + start % kChunk;
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(u + i, unpack_vec(from + i, top_vec));
  if (whole < n) {
    Packed last[kWidth] = {};
    std::memcpy(last, from + whole, (n - whole) * sizeof(Packed));
    store(u + whole, unpack_vec(last, top_vec));
  }
  if (slope) std::fill(slope, slope + padded(n), t.scale * t.inv_temperature);
}

}  // namespace
