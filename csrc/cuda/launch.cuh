// Launches a CUDA kernel and checks that it was accepted. No torch headers: three targets compile in seconds, not
// minutes.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/block.cuh"

namespace trl_fast::cuda {
namespace {

// Enqueues `kernel` on `stream` in blocks of kThreads. Throws std::runtime_error if the launch is refused.
template <typename Kernel, typename... Args>
void launch(const char* name, Kernel kernel, dim3 grid, cudaStream_t stream, const Args&... args) {
  kernel<<<grid, kThreads, 0, stream>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace
}  // namespace trl_fast::cuda
