// Launches the kernels of loss_kernels.cuh.
#include "cuda/loss_kernels.cuh"

#include "cuda/launch.cuh"
#include "cuda/loss_kernels.h"

namespace trl_fast::cuda {

void launch_pair_loss(const PairLossArgs& args, int64_t pairs, cudaStream_t stream) {
  dispatch_pair_loss(pairs, [&](auto kernel, dim3 grid) { launch("pair_loss", kernel, grid, stream, args); });
}

void launch_pair_loss_backward(const PairLossBackwardArgs& args, int64_t pairs, int64_t num_tokens,
                               cudaStream_t stream) {
  dispatch_pair_loss_backward(
      pairs, num_tokens, [&](auto kernel, dim3 grid) { launch("pair_loss_backward", kernel, grid, stream, args); });
}

void launch_policy_loss(const PolicyLossArgs& args, cudaStream_t stream) {
  dispatch_policy_loss(args.num_tokens,
                       [&](auto kernel, dim3 grid) { launch("policy_loss", kernel, grid, stream, args); });
}

}  // namespace trl_fast::cuda
