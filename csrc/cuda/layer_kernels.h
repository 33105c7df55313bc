// Declares the launchers of the CUDA kernels of layers. trl_fast/ops/layers specifies what they compute, layer_types.h
// their arguments; pointers are into device memory. Gradients by a norm's weight are summed by so many workers, each
// of which fills a row of `partials`; without those, a worker a row is right.
#pragma once

#include "layer_types.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace trl_fast::cuda {

// The launchers enqueue work on `stream` and return; they throw std::runtime_error if the launch is refused.
void launch_rms_norm(const NormArgs& args, CUstream_st* stream);
void launch_rms_norm_backward(const NormArgs& args, int64_t workers, CUstream_st* stream);
void launch_gated_activation(const GateArgs& args, int64_t rows, CUstream_st* stream);
void launch_gated_activation_backward(const GateArgs& args, int64_t rows, CUstream_st* stream);

// Of `rows` = B T heads.
void launch_rotary(const RotaryArgs& args, int64_t rows, CUstream_st* stream);
void launch_norm_rotary(const NormRotaryArgs& args, int64_t rows, CUstream_st* stream);
void launch_norm_rotary_backward(const NormRotaryArgs& args, int64_t rows, int64_t workers, CUstream_st* stream);

}  // namespace trl_fast::cuda
