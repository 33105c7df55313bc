// Logits in 16 bits: steps below the largest of their chunk.
//
// The format is specified by trl_fast/ops/packed_logits.py.
#pragma once

#include <cstdint>

namespace trl_fast {

constexpr int64_t kPackedChunk = 2048;  // columns that share a largest logit
constexpr float kPackedSteps = 1024;    // a nat
constexpr float kLowestCode = 65534;    // steps; what lies further down is brought up to here
constexpr float kMinusInfCode = 65535;
// A float of [2^23, 2^24) has its integer in the low bits: adding 2^23 rounds to it.
constexpr float kIntegers = 8388608;

// Words in front of a chunk where largest logits stand among the words, as they do without a tensor of their own.
constexpr int64_t kPackedHeader = 2;

constexpr int64_t num_chunks(int64_t columns) { return (columns + kPackedChunk - 1) / kPackedChunk; }

constexpr int64_t packed_columns(int64_t columns) { return columns + kPackedHeader * num_chunks(columns); }

// A packed row, or a chunk of it. Largest logits are floats at any address; strides are in 16-bit words.
struct PackedRow {
  uint16_t* words;
  int64_t chunk_stride;
  uint16_t* tops;
  int64_t top_stride;

  PackedRow chunk(int64_t number) const {
    return {words + number * chunk_stride, chunk_stride, tops + number * top_stride, top_stride};
  }
};

// Packed rows and which of them belong to a tile's rows: index (R,), null for all in order.
struct PackedRows {
  PackedRow first;
  int64_t words_stride;
  int64_t tops_stride;
  const int64_t* index;

  PackedRow row(int64_t r) const {
    const int64_t number = index ? index[r] : r;
    return {first.words + number * words_stride, first.chunk_stride, first.tops + number * tops_stride,
            first.top_stride};
  }
};

}  // namespace trl_fast
