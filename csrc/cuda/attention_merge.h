// Declares the launcher of the CUDA kernel that merges attention over two sets of keys;
// trl_fast/ops/attention_merge.py specifies it. Pointers are into device memory, strides in elements.
#pragma once

#include "row_types.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace trl_fast {

// What attention over a set of keys gave.
struct AttentionOutput {
  const void* out;  // (tokens, heads, width), contiguous in the last
  int64_t token_stride;
  int64_t head_stride;
  const float* lse;  // (heads, tokens), contiguous in the last
  int64_t lse_stride;
};

struct AttentionMergeArgs {
  AttentionOutput first;
  AttentionOutput second;
  const int32_t* place;  // (tokens,), the token of `second` that belongs to each one of `first`, or -1
  Dtype dtype;
  int64_t tokens;
  int64_t heads;
  int64_t width;
  void* merged;       // (tokens, heads, width), contiguous
  float* merged_lse;  // (heads, tokens), contiguous
};

namespace cuda {

// Enqueues work on `stream` and returns; throws std::runtime_error if the launch is refused.
void launch_attention_merge(const AttentionMergeArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace trl_fast
