// Launches the kernels of row_kernels.cuh and packed_row_kernels.cuh.
#include "cuda/launch.cuh"
#include "cuda/packed_row_kernels.cuh"
#include "cuda/row_kernels.h"

namespace trl_fast::cuda {

void launch_row_scores(const ScoreArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_scores(args, rows, [&](auto kernel, dim3 grid) { launch("row_scores", kernel, grid, stream, args); });
}

void launch_row_grad(const GradArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_grad(args, rows, [&](auto kernel, dim3 grid) { launch("row_grad", kernel, grid, stream, args); });
}

void launch_row_scores_packed(const ScoreArgs& args, const PackedRows& packed, int64_t rows, cudaStream_t stream) {
  dispatch_scores_packed(
      args, rows, [&](auto kernel, dim3 grid) { launch("row_scores_packed", kernel, grid, stream, args, packed); });
}

void launch_row_grad_packed(const GradArgs& args, const PackedRows& packed, int64_t rows, cudaStream_t stream) {
  dispatch_grad_packed(args, rows,
                       [&](auto kernel, dim3 grid) { launch("row_grad_packed", kernel, grid, stream, args, packed); });
}

}  // namespace trl_fast::cuda
