// Launches the kernels of layer_kernels.cuh.
#include "cuda/layer_kernels.cuh"

#include "cuda/launch.cuh"

namespace trl_fast::cuda {

void launch_rms_norm(const NormArgs& args, cudaStream_t stream) {
  dispatch_rms_norm(
      args, [&](auto kernel, dim3 grid, const auto&... given) { launch("rms_norm", kernel, grid, stream, given...); });
}

void launch_rms_norm_backward(const NormArgs& args, int64_t workers, cudaStream_t stream) {
  dispatch_rms_norm_backward(args, workers, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("rms_norm_backward", kernel, grid, stream, given...);
  });
}

void launch_gated_activation(const GateArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_gated_activation(args, rows, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("gated_activation", kernel, grid, stream, given...);
  });
}

void launch_gated_activation_backward(const GateArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_gated_activation_backward(args, rows, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("gated_activation_backward", kernel, grid, stream, given...);
  });
}

}  // namespace trl_fast::cuda
