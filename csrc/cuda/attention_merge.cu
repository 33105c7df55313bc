// Launches the kernel of attention_merge.cuh.
#include "cuda/attention_merge.cuh"

#include "cuda/launch.cuh"

namespace trl_fast::cuda {

void launch_attention_merge(const AttentionMergeArgs& args, cudaStream_t stream) {
  dispatch_attention_merge(args, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("attention_merge", kernel, grid, stream, given...);
  });
}

}  // namespace trl_fast::cuda
