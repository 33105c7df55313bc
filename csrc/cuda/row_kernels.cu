// Launches the kernels of row_kernels.cuh and packed_row_kernels.cuh. No torch headers: three targets compile in seconds,
// not minutes.
#include "packed_row_kernels.cuh"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace trl_fast::cuda {
namespace {

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace

void launch_row_scores(const ScoreArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_scores(args, rows, [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args); });
  check_launch("row_scores");
}

void launch_row_grad(const GradArgs& args, int64_t rows, cudaStream_t stream) {
  dispatch_grad(args, rows, [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args); });
  check_launch("row_grad");
}

void launch_row_scores_packed(const ScoreArgs& args, const PackedRows& packed, int64_t rows, cudaStream_t stream) {
  dispatch_scores_packed(args, rows,
                         [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args, packed); });
  check_launch("row_scores_packed");
}

void launch_row_grad_packed(const GradArgs& args, const PackedRows& packed, int64_t rows, cudaStream_t stream) {
  dispatch_grad_packed(args, rows,
                       [&](auto kernel, dim3 grid) { kernel<<<grid, kThreads, 0, stream>>>(args, packed); });
  check_launch("row_grad_packed");
}

}  // namespace trl_fast::cuda
