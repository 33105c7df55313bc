// The row kernels as plain C++: no torch, so that each instruction set is its own small translation unit.
//
// What they compute is specified by trl_fast/ops/head/row_kernels.py.
#pragma once

#include <cstdint>

namespace trl_fast {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Bits of the `outputs` mask, the numbers of trl_fast/ops/token_scores.py.
enum Output : int64_t { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8 };

// Rows of the state tensor, explained in trl_fast/ops/head/row_kernels.py.
enum State : int { kTop = 0, kSum = 1, kSumX = 2, kSumSq = 3, kTotal = 4, kTarget = 5, kBefore = 6, kNumStates = 7 };

// u = softcap * tanh(scale * (z + bias) / softcap) * inv_temperature; softcap 0 means none.
struct Transform {
  const float* bias;  // (C,) or null
  float scale;
  float softcap;
  float inv_temperature;
};

// A tile of raw logits.
struct Block {
  const void* logits;
  Dtype dtype;
  int64_t row_stride;  // elements
  int64_t columns;
  const int64_t* targets;  // (R,), columns of the full vocabulary
  int64_t column_offset;   // of the tile's first column
};

struct ScoreArgs {
  Block block;
  Transform transform;
  int64_t outputs;
  double* state;         // (kNumStates, R)
  int64_t state_stride;  // elements between two entries of a row
  void* weights;         // null, or room for e^(u - top) du/dz, dtype of the logits; may be the logits
  int64_t weights_stride;
};

struct GradArgs {
  Block block;
  Transform transform;
  const float* lse;           // (R,)
  const float* coefficients;  // rows a, b, d, e of (4, R)
  int64_t coefficient_stride;
  void* out;  // may be the logits if it has their dtype
  int64_t out_stride;
  Dtype out_dtype;  // that of the logits; on a GPU, float32 logits may have a narrower gradient
};

struct PackedRows;

// One instruction set's implementation; all work on rows [begin, end). Packed logits are those of float32 tiles,
// transformed and without a softcap: the block's pointer to logits is null where they are read.
struct RowKernels {
  void (*scores)(const ScoreArgs&, int64_t begin, int64_t end);
  void (*weights)(const ScoreArgs&, int64_t begin, int64_t end);
  void (*grad)(const GradArgs&, int64_t begin, int64_t end);
  void (*scores_packed)(const ScoreArgs&, const PackedRows&, int64_t begin, int64_t end);
  void (*grad_packed)(const GradArgs&, const PackedRows&, int64_t begin, int64_t end);
};

// The kernels for this machine: the best compiled instruction set that its CPU has, or the one that the environment
// variable TRL_FAST_CPU_ISA (default, avx2, avx512) names. Throws std::runtime_error if that one cannot run.
const RowKernels& row_kernels();

// The name of the instruction set of row_kernels().
const char* chosen_isa();

// Names of the instruction sets that were compiled, separated by commas.
const char* compiled_isas();

}  // namespace trl_fast
