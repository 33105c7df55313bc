// Launchers of the CUDA row kernels; arguments are those of the CPU kernels, with pointers into device memory.
#pragma once

#include <cstdint>

#include "packed_logits.h"
#include "row_types.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace trl_fast::cuda {

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxColumns = int64_t{1} << 26;

// All enqueue work on `stream` and return; they throw std::runtime_error if the launch is refused.
void launch_row_scores(const ScoreArgs& args, int64_t rows, CUstream_st* stream);
void launch_row_grad(const GradArgs& args, int64_t rows, CUstream_st* stream);
void launch_row_scores_packed(const ScoreArgs& args, const PackedRows& packed, int64_t rows, CUstream_st* stream);
void launch_row_grad_packed(const GradArgs& args, const PackedRows& packed, int64_t rows, CUstream_st* stream);

}  // namespace trl_fast::cuda
