// Merges what the parts of a row gave, kernels/linear_scores.py's merge_tiles_kernel for CUDA.
//
// A block takes 32 rows, a warp of it every eighth part: loads of a warp are 128 adjacent bytes. The largest logit of
// a row is found first, so that no sum is scaled twice. Which warp takes which parts depends on no number of rows. No
// torch headers: the same source compiles as host C++ (tests/support/simt.h).
#pragma once

#include "cuda/row_kernels.cuh"
#include "cuda/tile_scores.h"

namespace trl_fast {
namespace {

constexpr int kMergedRows = kWarpSize;

// A row's sums over some of its parts, relative to the row's largest logit.
struct MergedSums {
  double sum;
  double sum_x;
  double sum_sq;
  double total;
  float before;
};

__device__ inline void add_part(MergedSums& sums, const MergeArgs& args, int64_t row, int64_t part, float anchor) {
  const float* slot = args.parts.first + part * args.parts.part_stride + row;
  const auto next = [&] {
    const float value = *slot;
    slot += args.parts.slot_stride;
    return value;
  };
  const float top = next(), sum = next();
  const float shift = shift_to(top, anchor), factor = exp_flushed(shift);
  sums.sum += product(factor, sum);
  if (args.outputs & kEntropy) sums.sum_x += product(factor, fmaf(shift, sum, next()));
  if (args.outputs & kLogSumSqProbs) sums.sum_sq += product(factor * factor, next());
  if (args.outputs & kMeanLogits) sums.total += next();
  if (args.outputs & kIsTop1) sums.before = fmaxf(sums.before, next());
}

__global__ void __launch_bounds__(kThreads) merge_parts_kernel(MergeArgs args) {
  __shared__ float tops[kWarps][kMergedRows];
  __shared__ MergedSums of_warp[kWarps][kMergedRows];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kMergedRows + lane;
  const int64_t parts = row < args.rows ? args.num_parts : 0;

  float top = -INFINITY;
  for (int64_t part = warp; part < parts; part += kWarps) {
    const float of_part = args.parts.first[part * args.parts.part_stride + row];
    top = fmaxf(top, of_part);
    if (args.tops != nullptr) args.tops[row * args.tops_stride + part] = of_part;
  }
  tops[warp][lane] = top;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w][lane]);
  const float anchor = top == -INFINITY ? 0.0f : top;  // -inf - -inf is NaN

  MergedSums sums = {0, 0, 0, 0, -INFINITY};
  for (int64_t part = warp; part < parts; part += kWarps) add_part(sums, args, row, part, anchor);
  of_warp[warp][lane] = sums;
  __syncthreads();
  if (warp != 0 || row >= args.rows) return;
  for (int w = 1; w < kWarps; ++w) {
    const MergedSums& more = of_warp[w][lane];
    sums = {sums.sum + more.sum, sums.sum_x + more.sum_x, sums.sum_sq + more.sum_sq, sums.total + more.total,
            fmaxf(sums.before, more.before)};
  }
  double* state = args.state + row;
  state[kTop * args.state_stride] = top;
  state[kSum * args.state_stride] = sums.sum;
  if (args.outputs & kEntropy) state[kSumX * args.state_stride] = sums.sum_x;
  if (args.outputs & kLogSumSqProbs) state[kSumSq * args.state_stride] = sums.sum_sq;
  if (args.outputs & kMeanLogits) state[kTotal * args.state_stride] = sums.total;
  if (args.outputs & kIsTop1) state[kBefore * args.state_stride] = sums.before;
}

inline dim3 merge_grid(const MergeArgs& args) {
  return dim3(static_cast<unsigned>((args.rows + kMergedRows - 1) / kMergedRows));
}

}  // namespace
}  // namespace trl_fast
