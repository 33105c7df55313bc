// Defines the arguments of the divergence's row kernel, on the CPU and in CUDA. No torch headers.
//
// trl_fast/ops/divergence/row_kernels.py specifies the kernel, formulas.py beside it has the arithmetic.
#pragma once

#include "row_types.h"

namespace trl_fast {

// Rows of the results.
enum DivergenceResult : int { kDivergence = 0, kStudentEntropy = 1, kIsSameTop1 = 2, kNumDivergenceResults = 3 };

// Raw products of one head, whole rows.
struct DivergenceSide {
  const void* logits;
  Dtype dtype;
  int64_t row_stride;  // elements
  Transform transform;
};

// The numbers of DivergenceFormula.
struct DivergenceNumbers {
  float teacher_part;
  float student_part;
  float mixture;
  float one_minus_mixture;
  float tilt;  // teacher_part (1 - mixture) - student_part mixture
  bool is_tvd;
};

struct DivergenceArgs {
  DivergenceSide student;
  DivergenceSide teacher;
  int64_t columns;
  DivergenceNumbers numbers;
  const float* weights;    // (R,)
  float* results;          // (kNumDivergenceResults, R)
  int64_t results_stride;  // elements between two results of a row
  void* gradient;          // null, or (R, V); may be the student's logits
  int64_t gradient_stride;
  Dtype gradient_dtype;  // that of the student's logits; on a GPU, float32 logits may have a narrower gradient
};

}  // namespace trl_fast
