// Tests only: runs the scoring of tiles, csrc/cuda/tile_scores.cuh, on logits from memory in place of accumulators.
#pragma once

#include "support/simt.h"

// After the vocabulary that the kernels are written in.
#include "cuda/merge_parts.cuh"
#include "cuda/tile_scores.cuh"

namespace trl_fast {
namespace {

// A warpgroup, and the rows and columns of the tensor cores' instruction.
constexpr int kWarpgroup = 128, kAtomRows = 64, kAtomColumns = kFusedColumns;

// A warpgroup's part of a tile: what a thread has of it is written in PTX ISA's figure of the fragment D of
// wgmma.m64nNk16. Beyond the matrix, registers have what nobody may use.
inline void score_tile(const TileScoreArgs& args, const float* products, int64_t stride) {
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  for (int half = 0; half < 2; ++half) {
    const int row = blockIdx.x * kAtomRows + thread / kWarpSize * 16 + half * 8 + lane / 4;
    for (int first = 0; first < kAtomColumns; first += kPartColumns) {
      const int start = blockIdx.y * kAtomColumns + first;
      Fragment fragment(row, start / kPartColumns, lane);
      for (int k = 0; k < Fragment::kSize; ++k) {
        const int column = start + k / 2 * 8 + lane % 4 * 2 + k % 2;
        const bool there = row < args.rows && column < args.columns;
        fragment.u[k] = there ? products[row * stride + column] : NAN;
      }
      score_fragment(args, fragment);
    }
  }
}

inline void run_tiles(const TileScoreArgs& args, const float* products, int64_t stride, unsigned seed) {
  // As many rows as a tile has, also where they lie behind the last one.
  const int atoms = (args.rows + kFusedRows - 1) / kFusedRows * (kFusedRows / kAtomRows);
  const dim3 grid(atoms, (args.columns + kAtomColumns - 1) / kAtomColumns);
  simt::launch(grid, kWarpgroup, seed, [&] { score_tile(args, products, stride); });
}

inline void run_merge(const MergeArgs& args, unsigned seed) {
  simt::launch(merge_grid(args), kThreads, seed, [&] { merge_parts_kernel(args); });
}

}  // namespace
}  // namespace trl_fast
