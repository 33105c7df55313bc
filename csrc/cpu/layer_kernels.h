// Declares the kernels of a transformer's layers on the CPU: RMSNorm, gated activations, rotary embeddings.
//
// trl_fast/ops/layers specifies what they compute. Like the row kernels, they are compiled once per instruction set,
// without torch headers.
#pragma once

#include "layer_types.h"

namespace trl_fast {

// Rows whose gradients by a norm's weight are summed into one row of partial sums: few enough for float32.
constexpr int64_t kNormBlock = 64;
// The same for tokens, of which each has the rows of all its heads.
constexpr int64_t kTokenBlock = 16;

// Of each function, begin and end count what its line says.
struct LayerKernels {
  void (*norm)(const NormArgs&, int64_t begin, int64_t end);               // rows
  void (*norm_backward)(const NormArgs&, int64_t begin, int64_t end);      // blocks of kNormBlock rows
  void (*gate)(const GateArgs&, int64_t begin, int64_t end);               // elements
  void (*gate_backward)(const GateArgs&, int64_t begin, int64_t end);      // elements
  void (*rotary)(const RotaryArgs&, int64_t begin, int64_t end);           // tokens of all B rows
  void (*norm_rotary)(const NormRotaryArgs&, int64_t begin, int64_t end);  // tokens of all B rows
  void (*norm_rotary_backward)(const NormRotaryArgs&, int64_t tokens, int64_t begin, int64_t end);  // blocks of tokens
  void (*embedding_gradient)(const EmbeddingArgs&, int64_t begin, int64_t end);                     // groups
};

// The kernels of the instruction set that row_kernels() has.
const LayerKernels& layer_kernels();

}  // namespace trl_fast
