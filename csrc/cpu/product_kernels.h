// Declares the product of two matrices on the CPU, in float32, with factors and results of 16 bits too.
//
// trl_fast/ops/matmul.py says where it is used. Like the row kernels, it is compiled once per instruction set, without
// torch headers.
#pragma once

#include "row_types.h"

namespace trl_fast {

struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t row_stride;  // elements, as the other
  int64_t column_stride;
};

// out (rows, columns) = or, if `adds`, += left (rows, steps) @ right (steps, columns).
//
// Products are summed in float32, in blocks of steps that depend on `steps` alone, and rounded once to the dtype of
// `out`: the bits of a number depend on its row of `left` and its column of `right`, not on the shape around them, nor
// on how the product is shared among threads.
struct MatrixProduct {
  Matrix left;
  Matrix right;
  int64_t rows, columns, steps;
  void* out;
  Dtype out_dtype;
  int64_t out_stride;  // of its rows, which are contiguous
  bool adds;
};

// A part of `out`, which a thread computes.
struct ProductPart {
  int64_t row, column;  // the first
  int64_t rows, columns;
};

struct ProductKernels {
  // What a part should have a multiple of.
  int64_t tile_rows, tile_columns;
  // Floats of memory that a part takes meanwhile.
  int64_t (*scratch_floats)(const MatrixProduct&, const ProductPart&);
  // `scratch` is aligned to 64 bytes.
  void (*multiply)(const MatrixProduct&, const ProductPart&, float* scratch);
  // total (rows, columns) += the first rows and columns of `part`, in one pass. Rows of both are contiguous.
  void (*add)(const Matrix& part, int64_t rows, int64_t columns, float* total, int64_t total_stride);
};

// The kernels of the instruction set that row_kernels() has.
const ProductKernels& product_kernels();

}  // namespace trl_fast
