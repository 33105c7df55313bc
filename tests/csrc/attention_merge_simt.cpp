// The CUDA kernel that merges attention as a host library with C functions, for test_cuda_attention_merge.py.
#include "support/simt.h"

// After the vocabulary that the kernel is written in.
#include "cuda/attention_merge.cuh"

extern "C" {

// What the test's own structure has to be as large as.
int64_t simt_attention_merge_bytes() { return sizeof(trl_fast::AttentionMergeArgs); }

void simt_attention_merge(const trl_fast::AttentionMergeArgs* args, unsigned seed) {
  trl_fast::dispatch_attention_merge(*args, [&](auto kernel, dim3 grid, const auto&... given) {
    simt::launch(grid, trl_fast::kThreads, seed, [&] { kernel(given...); });
  });
}
}
