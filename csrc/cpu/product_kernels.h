// Declares the product of two matrices on the CPU, in float32, with factors and results of 16 bits too.
//
// trl_fast/ops/matmul.py says where it is used. Like the row kernels, it is compiled once per instruction set, without
// torch headers.
#pragma once

#include <atomic>

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

// A part of `out`, which one thread computes or several.
struct ProductPart {
  int64_t row, column;  // the first
  int64_t rows, columns;
};

// Columns of a part that several threads compute: each packs all of its rows, and takes some columns that no other has
// taken until none are left. A core may be slower than another for a while, when it runs a second thread.
struct SharedColumns {
  std::atomic<int64_t>* taken;  // for each of the part's chunks of rows, how many; 0 at first
  int64_t threads;
};

struct ProductKernels {
  // What the rows of a part should be a multiple of.
  int64_t tile_rows;
  // Floats of memory that each thread of a part takes meanwhile; `shared`: if there are several.
  int64_t (*scratch_floats)(const MatrixProduct&, const ProductPart&, bool shared);
  // Chunks of rows of a part that several threads compute.
  int64_t (*row_chunks)(const MatrixProduct&, const ProductPart&);
  // Computes a part, or with `shared` as much of it as other threads leave. `scratch` is aligned to 64 bytes.
  void (*multiply)(const MatrixProduct&, const ProductPart&, const SharedColumns* shared, float* scratch);
  // total (rows, columns) += the first rows and columns of `part`, in one pass. Rows of both are contiguous.
  void (*add)(const Matrix& part, int64_t rows, int64_t columns, float* total, int64_t total_stride);
};

// The kernels of the instruction set that row_kernels() has.
const ProductKernels& product_kernels();

}  // namespace trl_fast
