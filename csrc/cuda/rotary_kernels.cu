// Launches the kernels of rotary_kernels.cuh.
#include "cuda/rotary_kernels.cuh"

#include "cuda/launch.cuh"

namespace trl_fast::cuda {

void launch_rotary(const RotaryArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_rotary(args, rows, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("rotary", kernel, grid, stream, given...);
  });
}

void launch_norm_rotary(const NormRotaryArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_norm_rotary(args, rows, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("norm_rotary", kernel, grid, stream, given...);
  });
}

void launch_norm_rotary_backward(const NormRotaryArgs& args, int64_t rows, int64_t workers, cudaStream_t stream) {
  dispatch_norm_rotary_backward(args, rows, workers, [&](auto kernel, dim3 grid, const auto&... given) {
    launch("norm_rotary_backward", kernel, grid, stream, given...);
  });
}

}  // namespace trl_fast::cuda
