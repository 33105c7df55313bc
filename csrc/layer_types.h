// Defines what the kernels of a transformer's layers on the CPU and on CUDA share: their arguments. No torch headers.
//
// trl_fast/ops/layers specifies what they compute.
#pragma once

#include "row_types.h"

namespace trl_fast {

// Rows that are contiguous themselves and lie in up to three dimensions.
struct Rows {
  const void* data;
  int64_t sizes[2];    // of the second and the third of these dimensions
  int64_t strides[3];  // elements
};

// Workers on a GPU that take a weight's gradient apart: enough to fill one, and fewer the wider a row is. Each leaves
// a row of sums; kernels/shared_constants.py has the same numbers, so that they are the same on every GPU.
constexpr int64_t kFewestWorkers = 256, kNumbersOfWorkers = int64_t{1} << 20;

// Where numbers are rounded on the way from the normalised row n = x rstd to the result.
enum class NormCast : int {
  kLlama = 0,  // weight * dtype(n)
  kGemma = 1,  // dtype(n * (1 + weight))
  kOlmo = 2,   // dtype(n * weight)
};

// The weight of a norm, and how it is applied.
struct NormWeight {
  const void* data;  // (columns,), or null for ones
  Dtype dtype;       // of the rows, too
  NormCast cast;
  int64_t columns;
};

struct NormArgs {
  NormWeight weight;
  Rows x;
  Rows residual;  // forward: added to x first, if it has data
  float eps;
  int64_t rows;
  float* rstd;      // (R,) 1 / sqrt(mean of squares + eps), written forward and read backward
  void* sum;        // (R, H): x + residual, where there is one
  void* out;        // (R, H): the result, or backward the gradient by x; may be null backward
  Rows grad;        // backward only
  Rows grad_sum;    // backward only: added to the gradient by x, if it has data
  float* partials;  // (blocks or workers, H) sums of the gradient by the weight, or null; backward only
};

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// Matrices of `columns` contiguous numbers a row; strides in elements.
struct GateArgs {
  const void* gate;
  const void* up;
  int64_t stride;  // of gate and up
  int64_t columns;
  Dtype dtype;
  Activation activation;
  void* out;         // activation(gate) * up, contiguous; forward only
  const void* grad;  // contiguous; backward only, as all below
  void* grad_gate;
  void* grad_up;
  int64_t grad_stride;  // of both
};

// Which numbers of a head are turned together.
enum class Pairs : int {
  kHalves = 0,            // x[i] and x[i + R / 2]
  kAdjacent = 1,          // x[2 i] and x[2 i + 1]
  kAdjacentToHalves = 2,  // these, and they come out as halves
};

// The rotation of the first R numbers of each head; the others pass.
struct Turns {
  const void* cos;  // (B or 1, T, R), or (B or 1, T, R / 2) if a pair has one angle; contiguous in the last
  const void* sin;
  int64_t cos_strides[2];  // of B, T; 0 where all rows share them
  int64_t sin_strides[2];
  Dtype dtype;  // that of the heads, or float32
  bool one_angle_a_pair;
  bool upcast;  // one rounding at the end; else each product is rounded, and their sum
  Pairs pairs;
  int64_t width;     // R
  bool is_backward;  // the transposed rotation
};

// Heads of a contiguous (B, T, heads, D), read by any strides of B, heads and T.
struct Heads {
  const void* x;  // (B, heads, T, D), contiguous in D
  int64_t x_strides[3];
  Dtype dtype;
  int64_t heads, tokens, width;
};

struct RotaryArgs {
  Heads heads;
  Turns turns;
  void* out;  // (B, T, heads, D), contiguous
};

struct NormRotaryArgs {
  Heads heads;      // before the norm
  Turns turns;      // after it
  NormWeight norm;  // of D columns, or of heads * D: then a token has one norm, and its heads lie side by side
  float eps;
  float* rstd;       // (B T, heads or 1)
  void* out;         // (B, T, heads, D), contiguous: the result, or backward the gradient by x or null
  const void* grad;  // (B, heads, T, D), contiguous in D; backward only, as all below
  int64_t grad_strides[3];
  float* partials;  // (blocks or workers, columns of the norm) sums of the gradient by the weight, or null
};

// The gradient of an embedding: rows of equal tokens are summed, in the order in which they come.
struct EmbeddingArgs {
  const void* grad;  // (N, H), contiguous
  Dtype dtype;
  int64_t columns;
  const int64_t* order;    // places 0 to N - 1, sorted by token
  const int64_t* offsets;  // (groups + 1,) of the first place of each token, and their end
  const int64_t* tokens;   // (groups,) ascending
  int64_t groups;
  bool adds;     // to the rows of tokens; else all rows are written, zeros where there is no token
  int64_t rows;  // of out
  void* out;     // (rows, H), contiguous
};

}  // namespace trl_fast
