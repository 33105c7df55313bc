// Launches the kernel of divergence_kernels.cuh.
#include "cuda/divergence_kernels.cuh"
#include "cuda/divergence_kernels.h"
#include "cuda/launch.cuh"

namespace trl_fast::cuda {

void launch_row_divergence(const DivergenceArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_divergence(args, rows,
                      [&](auto kernel, dim3 grid) { launch("row_divergence", kernel, grid, stream, args); });
}

}  // namespace trl_fast::cuda
