// The CUDA kernels of layers as a host library with C functions, for test_cuda_layers.py.
#include "support/simt.h"

// After the vocabulary that the kernels are written in.
#include "cuda/rotary_kernels.cuh"

using namespace trl_fast;

namespace {

auto launching(unsigned seed) {
  return [=](auto kernel, dim3 grid, const auto&... given) {
    simt::launch(grid, kThreads, seed, [&] { kernel(given...); });
  };
}

}  // namespace

extern "C" {

void simt_rms_norm(const NormArgs* args, unsigned seed) { dispatch_rms_norm(*args, launching(seed)); }

void simt_rms_norm_backward(const NormArgs* args, int64_t workers, unsigned seed) {
  dispatch_rms_norm_backward(*args, workers, launching(seed));
}

void simt_gated_activation(const GateArgs* args, int64_t rows, unsigned seed) {
  dispatch_gated_activation(*args, rows, launching(seed));
}

void simt_gated_activation_backward(const GateArgs* args, int64_t rows, unsigned seed) {
  dispatch_gated_activation_backward(*args, rows, launching(seed));
}

void simt_rotary(const RotaryArgs* args, int64_t rows, unsigned seed) {
  dispatch_rotary(*args, rows, launching(seed));
}

void simt_norm_rotary(const NormRotaryArgs* args, int64_t rows, unsigned seed) {
  dispatch_norm_rotary(*args, rows, launching(seed));
}

void simt_norm_rotary_backward(const NormRotaryArgs* args, int64_t rows, int64_t workers, unsigned seed) {
  dispatch_norm_rotary_backward(*args, rows, workers, launching(seed));
}
}
