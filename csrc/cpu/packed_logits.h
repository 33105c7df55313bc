// Logits in 16 bits: steps below the largest of their chunk.
//
// The format is specified by trl_fast/ops/kept_logits.py.
#pragma once

#include <cstdint>

namespace trl_fast {

constexpr int64_t kPackedChunk = 2048;  // columns that share a largest logit
constexpr int64_t kPackedHeader = 2;    // 16-bit words in front of a chunk: its largest logit, a float
constexpr float kPackedStep = 1.0f / 1024;

constexpr int64_t packed_columns(int64_t columns) {
  return columns + kPackedHeader * ((columns + kPackedChunk - 1) / kPackedChunk);
}

// Packed rows (K, packed_columns(C)) and which of them belong to a tile's rows: index (R,), null for all in order.
struct PackedRows {
  uint16_t* words;
  int64_t row_stride;  // words
  const int64_t* index;

  uint16_t* row(int64_t r) const { return words + (index ? index[r] : r) * row_stride; }
};

}  // namespace trl_fast
