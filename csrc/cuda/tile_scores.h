// Arguments and launchers of the fused kernel of the head: a product whose logits are scored in registers, and the
// kernel that merges its parts. No torch headers, no CUTLASS.
//
// kernels/linear_scores.py is the Triton kernel that computes the same, and describes it.
#pragma once

#include <cstdint>

#include "row_types.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace trl_fast {

// Rows and columns of a tile of logits, which one warpgroup accumulates.
constexpr int kFusedRows = 128;
constexpr int kFusedColumns = 192;
// A tile is scored in parts of so many columns. They are also the chunks of kept logits: a power of two, so that they
// fit whatever slices of columns gradients are computed in.
constexpr int kPartColumns = 64;

// Sums that a part gives for every row, float32, in this order: the largest logit of other classes than the target's;
// their exponentials' sum, relative to it; and those that `outputs` asks for, in the order of its bits.
struct Parts {
  float* first;         // (slots, parts, R)
  int64_t slot_stride;  // elements
  int64_t part_stride;
};

// The scores of a slice of the vocabulary.
struct TileScoreArgs {
  const int64_t* targets;  // (R,), columns of the slice
  Transform transform;     // from products to logits
  int64_t outputs;
  int rows;
  int columns;
  Parts parts;    // from the slice's first on
  double* state;  // (kNumStates, R): the target's logit is written to it
  int64_t state_stride;
  uint16_t* words;  // (R, C) or null: takes logits, packed; rows begin at multiples of 16 bytes
  float* raw;       // or this: takes products
  int64_t kept_stride;
};

// The factors of a slice's logits, both of `dtype`, which has 16 bits; rows begin at multiples of 16 bytes.
struct FusedFactors {
  Dtype dtype;
  const void* hidden;  // (R, H)
  int64_t hidden_stride;
  const void* weight;  // (C, H)
  int64_t weight_stride;
  int64_t hidden_size;
};

struct MergeArgs {
  Parts parts;
  int64_t rows;
  int64_t num_parts;
  int64_t outputs;
  double* state;  // (kNumStates, R)
  int64_t state_stride;
  float* tops;  // (R, num_parts) or null
  int64_t tops_stride;
};

namespace cuda {

// Both enqueue work on `stream` and return; they throw std::runtime_error if the launch is refused. The first is
// compiled for sm_90a, with CUTLASS; see fused_scores_sm90.cu.
void launch_fused_scores(const FusedFactors& factors, const TileScoreArgs& args, CUstream_st* stream);
void launch_merge_parts(const MergeArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace trl_fast
