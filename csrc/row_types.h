// Defines what the row kernels of the CPU and of CUDA share: their arguments, and the numbers of dtypes, outputs and
// state rows. No torch headers, so that every kernel file compiles in seconds.
//
// trl_fast/ops/head/row_kernels.py specifies the kernels. kernels/shared_constants.py has the same numbers; they are
// compared when the extension is loaded (csrc/bindings.cpp).
#pragma once

#include <cstdint>

namespace trl_fast {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Bits of the `outputs` mask.
enum Output : int64_t { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8 };

// Rows of the state tensor (trl_fast/ops/head/row_statistics.py explains them): the sums leave the row's target out.
enum State : int { kTop = 0, kSum = 1, kSumX = 2, kSumSq = 3, kTotal = 4, kTarget = 5, kBefore = 6, kNumStates = 7 };

// Coefficients of a row's gradient: a, b, d, e of trl_fast/ops/head/row_kernels.py; d is the target's own gradient.
constexpr int kNumCoefficients = 4;

// u = softcap * tanh(scale * (z + bias) / softcap) * inv_temperature; softcap 0 means none.
struct Transform {
  const float* bias;  // (C,) or null
  float scale;
  float softcap;
  float inv_temperature;
};

// A tile of raw logits.
struct LogitTile {
  const void* logits;
  Dtype dtype;
  int64_t row_stride;  // elements
  int64_t columns;
  const int64_t* targets;  // (R,), columns of the full vocabulary
  int64_t column_offset;   // of the tile's first column
};

struct ScoreArgs {
  LogitTile tile;
  Transform transform;
  int64_t outputs;
  double* state;         // (kNumStates, R)
  int64_t state_stride;  // elements between two entries of a row
  void* weights;         // null, or room for e^(u - top) du/dz, 0 at the target, dtype of the logits; may be them
  int64_t weights_stride;
};

struct GradArgs {
  LogitTile tile;
  Transform transform;
  const float* lse;           // (R,)
  const float* coefficients;  // rows a, b, d, e of (4, R)
  int64_t coefficient_stride;
  void* out;  // may be the logits if it has their dtype
  int64_t out_stride;
  Dtype out_dtype;  // that of the logits; on a GPU, float32 logits may have a narrower gradient
};

}  // namespace trl_fast
