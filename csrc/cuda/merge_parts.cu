// Launches the kernel of merge_parts.cuh.
#include "cuda/launch.cuh"
#include "cuda/merge_parts.cuh"

namespace trl_fast::cuda {

void launch_merge_parts(const MergeArgs& args, cudaStream_t stream) {
  if (args.rows > 0) launch("merge_parts", merge_parts_kernel, merge_grid(args), stream, args);
}

}  // namespace trl_fast::cuda
