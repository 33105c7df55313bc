// Chunks of packed logits. Like simd.h this lives in an unnamed namespace, once per translation unit.
#pragma once

#include "packed_logits.h"
#include "row_chunks.h"

namespace {

static_assert(trl_fast::kPackedChunk == kChunk);

// No -inf but where the chunk has nothing else: -inf - -inf is NaN, and no number of steps below infinity.
inline HVec pack_vec(Vec u, Vec top) {
  const Vec steps = (top - u) * splat(trl_fast::kPackedSteps);
  const Vec limit = steps < splat(kInf) ? splat(trl_fast::kLowestCode) : splat(trl_fast::kMinusInfCode);
  const Vec code = steps < limit ? steps : limit;
  return __builtin_convertvector(bits_as<UVec>(code + splat(trl_fast::kIntegers)), HVec);
}

// Packs the logits of a chunk of n columns whose largest is `top`, padded to whole vectors.
void pack_chunk(const float* u, int64_t n, float top, const trl_fast::PackedRow& chunk) {
  *chunk.tops = top;
  const Vec top_vec = splat(top);
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const HVec codes = pack_vec(load(u + i), top_vec);
    std::memcpy(chunk.words + i, &codes, sizeof(codes));
  }
  if (whole == n) return;
  const HVec last = pack_vec(load(u + whole), top_vec);
  std::memcpy(chunk.words + whole, &last, (n - whole) * sizeof(uint16_t));
}

inline Vec unpack_vec(const uint16_t* from, Vec top) {
  HVec codes;
  std::memcpy(&codes, from, sizeof(codes));
  const UVec integers = __builtin_convertvector(codes, UVec) | bits_as<UVec>(splat(trl_fast::kIntegers));
  const Vec code = bits_as<Vec>(integers) - splat(trl_fast::kIntegers);
  return code == splat(trl_fast::kMinusInfCode) ? splat(-kInf) : top - code * splat(1 / trl_fast::kPackedSteps);
}

// Logits of columns [start, start + n) of one chunk. They were transformed before they were packed, without a softcap.
inline void logits_chunk(const trl_fast::PackedRow& row, const trl_fast::Transform& t, int64_t start, int64_t n,
                         float* u, float* derivative = nullptr) {
  const trl_fast::PackedRow chunk = row.chunk(start / kChunk);
  const Vec top_vec = splat(*chunk.tops);
  const uint16_t* from = chunk.words + start % kChunk;
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(u + i, unpack_vec(from + i, top_vec));
  if (whole < n) {
    uint16_t last[kWidth] = {};
    std::memcpy(last, from + whole, (n - whole) * sizeof(uint16_t));
    store(u + whole, unpack_vec(last, top_vec));
  }
  if (derivative) std::fill(derivative, derivative + padded(n), t.scale * t.inv_temperature);
}

}  // namespace
