// Launcher of the CUDA kernel of divergences; arguments are those of the CPU kernel, with pointers into device memory.
#pragma once

#include <cstdint>

#include "divergence_types.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace trl_fast::cuda {

// Enqueues work on `stream` and returns; float32 logits. Throws std::runtime_error if the launch is refused.
void launch_row_divergence(const DivergenceArgs& args, int64_t rows, CUstream_st* stream);

}  // namespace trl_fast::cuda
