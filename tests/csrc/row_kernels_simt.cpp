// The CUDA row kernels as a host library with C functions, for test_cuda_rows.py.
#include "support/simt.h"

// After the vocabulary that the kernels are written in.
#include "cuda/packed_row_kernels.cuh"

extern "C" {

// What the test's own structures have to be as large as.
void simt_argument_bytes(int64_t* bytes) {
  bytes[0] = sizeof(trl_fast::ScoreArgs);
  bytes[1] = sizeof(trl_fast::GradArgs);
  bytes[2] = sizeof(trl_fast::PackedRows);
}

void simt_row_scores(const trl_fast::ScoreArgs* args, int64_t rows, unsigned seed) {
  trl_fast::dispatch_scores(*args, rows, [&](auto kernel, dim3 grid) {
    simt::launch(grid, trl_fast::kThreads, seed, [&] { kernel(*args); });
  });
}

void simt_row_grad(const trl_fast::GradArgs* args, int64_t rows, unsigned seed) {
  trl_fast::dispatch_grad(*args, rows, [&](auto kernel, dim3 grid) {
    simt::launch(grid, trl_fast::kThreads, seed, [&] { kernel(*args); });
  });
}

void simt_row_scores_packed(const trl_fast::ScoreArgs* args, const trl_fast::PackedRows* packed, int64_t rows,
                            unsigned seed) {
  trl_fast::dispatch_scores_packed(*args, rows, [&](auto kernel, dim3 grid) {
    simt::launch(grid, trl_fast::kThreads, seed, [&] { kernel(*args, *packed); });
  });
}

void simt_row_grad_packed(const trl_fast::GradArgs* args, const trl_fast::PackedRows* packed, int64_t rows,
                          unsigned seed) {
  trl_fast::dispatch_grad_packed(*args, rows, [&](auto kernel, dim3 grid) {
    simt::launch(grid, trl_fast::kThreads, seed, [&] { kernel(*args, *packed); });
  });
}
}
