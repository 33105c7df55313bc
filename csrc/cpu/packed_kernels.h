// Logits in 16 bits: steps below the largest of their chunk.
//
// The format is specified by trl_fast/ops/kept_logits.py.
#pragma once

#include <cstdint>

namespace trl_fast {

constexpr int64_t kPackedChunk = 2048;  // columns that share a largest logit
constexpr int64_t kPackedHeader = 2;    // 16-bit words in front of a chunk: its largest logit, a float

constexpr int64_t packed_columns(int64_t columns) {
  return columns + kPackedHeader * ((columns + kPackedChunk - 1) / kPackedChunk);
}

struct PackArgs {
  float* logits;  // (R, C); read by pack, written by unpack
  int64_t logits_stride;
  int64_t columns;
  uint16_t* packed;  // (K, packed_columns(C))
  int64_t packed_stride;
  const int64_t* index;  // unpack: (R,), which rows of `packed`; null for all in order
  float step;
};

// One instruction set's implementation; all work on rows [begin, end) of the logits.
struct PackedKernels {
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);
  void (*unpack)(const PackArgs&, int64_t begin, int64_t end);
};

const PackedKernels& packed_kernels();

}  // namespace trl_fast
