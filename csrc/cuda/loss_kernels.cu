// Launches the kernels of loss_kernels.cuh. No torch headers: three targets compile in seconds, not minutes.
#include "cuda/loss_kernels.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/loss_kernels.cuh"

namespace trl_fast::cuda {
namespace {

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace

void launch_pair_loss(const PairLossArgs& args, int64_t pairs, cudaStream_t stream) {
  dispatch_pair_loss(pairs, [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args); });
  check_launch("pair_loss");
}

void launch_pair_loss_backward(const PairLossBackwardArgs& args, int64_t pairs, int64_t num_tokens,
                               cudaStream_t stream) {
  dispatch_pair_loss_backward(pairs, num_tokens,
                              [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args); });
  check_launch("pair_loss_backward");
}

void launch_policy_loss(const PolicyLossArgs& args, cudaStream_t stream) {
  dispatch_policy_loss(args.num_tokens, [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args); });
  check_launch("policy_loss");
}

}  // namespace trl_fast::cuda
