// Declares the divergence's row kernel of the CPU as a plain C++ function; see row_kernels.h.
//
// trl_fast/ops/divergence/row_kernels.py specifies what it computes.
#pragma once

#include "divergence_types.h"

namespace trl_fast {

// One instruction set's implementation; all work on rows [begin, end).
struct DivergenceKernels {
  void (*divergence)(const DivergenceArgs&, int64_t begin, int64_t end);
};

const DivergenceKernels& divergence_kernels();

}  // namespace trl_fast
