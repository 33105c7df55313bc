// The CUDA kernel of divergences as a host library with C functions, for test_cuda_divergence.py.
#include "support/simt.h"

// After the vocabulary that the kernels are written in.
#include "cuda/divergence_kernels.cuh"

extern "C" {

// What the test's own structure has to be as large as.
int64_t simt_divergence_bytes() { return sizeof(trl_fast::DivergenceArgs); }

void simt_row_divergence(const trl_fast::DivergenceArgs* args, int64_t rows, unsigned seed) {
  trl_fast::dispatch_divergence(*args, rows, [&](auto kernel, dim3 grid) {
    simt::launch(grid, trl_fast::kThreads, seed, [&] { kernel(*args); });
  });
}
}
