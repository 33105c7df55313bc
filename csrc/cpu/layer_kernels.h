// Declares the kernels of a transformer's layers on the CPU: RMSNorm, gated activations, rotary embeddings.
//
// trl_fast/ops/layers specifies what they compute. Like the row kernels, they are compiled once per instruction set,
// without torch headers.
#pragma once

#include "row_types.h"

namespace trl_fast {

// Rows whose gradients by a norm's weight are summed into one row of partial sums: few enough for float32.
constexpr int64_t kNormBlock = 64;

struct NormArgs {
  const void* x;  // (R, H)
  int64_t x_stride;
  const void* weight;  // (H,)
  Dtype dtype;         // of all but rstd and the partial sums
  int64_t rows;
  int64_t columns;
  float eps;
  bool is_gemma;     // weight + 1 in float32 and one rounding; else the normalised row is rounded before the weight
  float* rstd;       // (R,) 1 / sqrt(mean of squares + eps), written forward and read backward
  void* out;         // (R, H): the result, or backward the gradient by x; may be null backward
  const void* grad;  // (R, H), backward only
  int64_t grad_stride;
  float* partials;  // (ceil(R / kNormBlock), H) sums of the gradient by the weight, or null; backward only
};

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

struct GateArgs {
  const void* gate;  // contiguous, as all others
  const void* up;
  Dtype dtype;
  Activation activation;
  void* out;         // activation(gate) * up; forward only
  const void* grad;  // backward only, as the two below
  void* grad_gate;
  void* grad_up;
};

struct RotaryArgs {
  const void* x;         // (B, heads, T, D), contiguous in D
  int64_t x_strides[3];  // of B, heads, T
  const void* cos;       // (B or 1, T, D), contiguous in D
  const void* sin;
  int64_t cos_strides[2];  // of B, T; 0 where all rows share them
  int64_t sin_strides[2];
  void* out;  // (B, T, heads, D), contiguous
  Dtype dtype;
  int64_t heads, tokens, width;
  bool is_backward;  // the transposed rotation
};

struct LayerKernels {
  void (*norm)(const NormArgs&, int64_t begin, int64_t end);           // rows
  void (*norm_backward)(const NormArgs&, int64_t begin, int64_t end);  // blocks of kNormBlock rows
  void (*gate)(const GateArgs&, int64_t begin, int64_t end);           // elements
  void (*gate_backward)(const GateArgs&, int64_t begin, int64_t end);  // elements
  void (*rotary)(const RotaryArgs&, int64_t begin, int64_t end);       // tokens of all B rows
};

// The kernels of the instruction set that row_kernels() has.
const LayerKernels& layer_kernels();

}  // namespace trl_fast
