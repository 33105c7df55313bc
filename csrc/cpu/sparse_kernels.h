// The sparse gradient of the head: which entries of a row's probabilities are kept, and products with what was kept.
//
// What they compute is specified by trl_fast/ops/head/sparse_gradient.py.
#pragma once

#include "row_kernels.h"

namespace trl_fast {

struct SampleArgs {
  const void* logits;  // (T, R, W) raw logits, tile by tile
  Dtype dtype;
  int64_t rows;
  int64_t tile_stride;  // elements
  int64_t row_stride;   // elements
  int64_t width;        // W
  int64_t vocab_size;
  Transform transform;    // its bias is (V,)
  const float* lse;       // (R,)
  const double* offsets;  // (R,), in [0, 1)
  double threshold;
};

struct ProductArgs {
  const int64_t* row_offsets;  // (M + 1,), where each row's entries begin
  const int64_t* indices;      // (E,), rows of `dense`
  const float* values;         // (E,)
  const void* dense;           // (K, H)
  Dtype dense_dtype;
  int64_t dense_stride;  // elements
  int64_t width;         // H
  void* out;             // (M, H)
  Dtype out_dtype;
  int64_t out_stride;  // elements
};

// One instruction set's implementation.
struct SparseKernels {
  // Entries kept of a row, in order, into buffers of `capacity`; how many there are, at most `capacity` + 1.
  int64_t (*sample)(const SampleArgs&, int64_t row, int32_t* columns, float* logprobs, int64_t capacity);
  // Rows [begin, end) of the product; scratch has room for `width` floats and one vector more.
  void (*product)(const ProductArgs&, int64_t begin, int64_t end, float* scratch);
};

const SparseKernels& sparse_kernels();

}  // namespace trl_fast
