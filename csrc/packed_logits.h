// Logits in 16 bits: steps below the largest of their chunk.
//
// The format is specified by trl_fast/ops/head/kept_logits.py. The row's target is packed as -inf.
#pragma once

#include <cstdint>

namespace trl_fast {

constexpr int64_t kPackedChunk = 2048;  // columns that share a largest logit
constexpr float kPackedSteps = 1024;    // a nat
constexpr float kLowestCode = 65534;    // steps; what lies further down is brought up to here
constexpr float kMinusInfCode = 65535;
// A float of [2^23, 2^24) has its integer in the low bits: adding 2^23 rounds to it.
constexpr float kIntegers = 8388608;

constexpr int64_t num_chunks(int64_t columns) { return (columns + kPackedChunk - 1) / kPackedChunk; }

// A packed row, or a chunk of it.
struct PackedRow {
  uint16_t* words;
  float* tops;

  PackedRow chunk(int64_t number) const { return {words + number * kPackedChunk, tops + number}; }
};

// Packed rows and which of them belong to a tile's rows: index (R,), null for all in order. Strides are in elements.
struct PackedRows {
  PackedRow first;
  int64_t words_stride;
  int64_t tops_stride;
  const int64_t* index;

  PackedRow row(int64_t r) const {
    const int64_t number = index ? index[r] : r;
    return {first.words + number * words_stride, first.tops + number * tops_stride};
  }
};

}  // namespace trl_fast
