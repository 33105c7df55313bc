// Scores a tile of logits that lies in the registers of a warpgroup, in parts of 64 columns.
//
// It lies there as the tensor cores' asynchronous instructions leave it (PTX ISA, wgmma, "register fragments of D"):
// a row in the four threads of a quad, which have every fourth pair of its columns. A part's maximum and its sums are
// thus two shuffles away, and no shared memory is needed. Kept logits are exchanged in the quad, so that a thread
// writes eight of them, sixteen bytes, and a quad two whole sectors.
//
// No atomics, and a row's numbers depend on no other row: the same row gives the same bits. Which sums are asked for
// is a branch and not a template: these instructions run while the other warpgroup multiplies. No torch headers, no
// CUTLASS: the same source compiles as host C++ (tests/support/simt.h).
#pragma once

#include "cuda/packed_row_kernels.cuh"
#include "cuda/tile_scores.h"

namespace trl_fast {
namespace {

constexpr int kQuad = 4;
// Columns that a quad writes at once: eight a thread.
constexpr int kWrittenColumns = 8 * kQuad;

__device__ inline float quad_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// The column, in a part, of number k of those that the first thread of a quad has; the next thread's is two further.
__device__ constexpr int fragment_column(int k) { return k / 2 * 8 + k % 2; }

// Transposes a 4x4 matrix, of which each thread of a quad has a row.
__device__ inline void transpose_quad(uint32_t (&row)[kQuad], int thread) {
#pragma unroll
  for (int distance = 1; distance < kQuad; distance *= 2) {
    const bool second = thread & distance;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (k & distance) continue;
      const uint32_t got = __shfl_xor_sync(kWholeWarp, second ? row[k] : row[k + distance], distance);
      row[k] = second ? got : row[k];
      row[k + distance] = second ? row[k + distance] : got;
    }
  }
}

// Writes what is not soon read: the factors of the products to come had better stay in the cache.
__device__ inline void store_evict_first(uint4* to, uint4 value) {
#ifdef __CUDA_ARCH__
  __stcs(to, value);
#else
  *to = value;
#endif
}

// What a thread has of a row of a part: logits u, of which number k is that of column fragment_column(k), counted from
// the thread's first one. Columns are compared as constants with what is left behind the thread's first: sums of both
// would be computed once, outside of the loop over tiles, and there would be no registers to hold them.
struct Fragment {
  static constexpr int kSize = kPartColumns / kQuad;
  float u[kSize];
  int row;
  int part;
  int thread;  // of the quad

  __device__ Fragment(int row, int part, int lane) : row(row), part(part), thread(lane % kQuad) {}

  __device__ int start() const { return part * kPartColumns; }
};

// From products to logits. columns: behind the thread's first.
__device__ inline void transform(const Transform& to, Fragment& fragment, int columns) {
  if (to.bias != nullptr) {
    const float* bias = to.bias + fragment.start() + 2 * fragment.thread;
#pragma unroll
    for (int k = 0; k < Fragment::kSize; ++k) {
      if (fragment_column(k) < columns) fragment.u[k] += bias[fragment_column(k)];
    }
  }
  if (to.softcap != 0.0f) {
    const float inner = to.scale / to.softcap;
#pragma unroll
    for (int k = 0; k < Fragment::kSize; ++k)
      fragment.u[k] = product(to.softcap, tanhf(product(fragment.u[k], inner)));
  }
  const float factor = to.softcap != 0.0f ? to.inv_temperature : to.scale * to.inv_temperature;
  if (factor != 1.0f) {
#pragma unroll
    for (int k = 0; k < Fragment::kSize; ++k) fragment.u[k] = product(fragment.u[k], factor);
  }
}

// Writes the row's products. columns: behind the thread's first.
__device__ inline void keep_raw(const TileScoreArgs& args, const Fragment& fragment, int columns) {
  const int left = fragment.row < args.rows ? columns : 0;
  float* raw = args.raw + fragment.row * args.kept_stride + fragment.start() + 2 * fragment.thread;
#pragma unroll
  for (int k = 0; k < Fragment::kSize; k += 2) {
    const int column = fragment_column(k);
    if (column + 2 <= left) {
      *reinterpret_cast<float2*>(raw + column) = {fragment.u[k], fragment.u[k + 1]};
    } else if (column < left) {
      raw[column] = fragment.u[k];
    }
  }
}

// Writes the row's words, steps below `top`. columns: of the part.
__device__ inline void keep(const TileScoreArgs& args, const Fragment& fragment, float top, int columns) {
  // A thread writes eight columns, and has none left if its row is not there.
  const int left = fragment.row < args.rows ? columns - 8 * fragment.thread : 0;
  uint16_t* words = args.words + fragment.row * args.kept_stride + fragment.start() + 8 * fragment.thread;
#pragma unroll
  for (int start = 0; start < kPartColumns; start += kWrittenColumns) {
    uint32_t pairs[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const float* u = fragment.u + start / kQuad + 2 * k;
      pairs[k] = packed_word(u[0], top) | static_cast<uint32_t>(packed_word(u[1], top)) << 16;
    }
    transpose_quad(pairs, fragment.thread);
    if (start + 8 <= left) {
      store_evict_first(reinterpret_cast<uint4*>(words + start), {pairs[0], pairs[1], pairs[2], pairs[3]});
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (start + k < left) words[start + k] = static_cast<uint16_t>(pairs[k / 2] >> (k % 2 * 16));
      }
    }
  }
}

// Scores a row of a part: of a quad, each thread with its fragment of the product. All threads of a warp call it,
// those whose row is not there, too, for the same part.
__device__ inline void score_fragment(const TileScoreArgs& args, Fragment fragment) {
  constexpr int kSize = Fragment::kSize;
  if (fragment.start() >= args.columns) return;
  float (&u)[kSize] = fragment.u;
  const bool there = fragment.row < args.rows;
  const int behind = args.columns - fragment.start(), columns = behind < kPartColumns ? behind : kPartColumns;
  // Behind the thread's first column: the columns of the part, and the target, which may lie before or after the part.
  const int left = columns - 2 * fragment.thread;
  const int64_t target = there ? args.targets[fragment.row] - fragment.start() : -1;
  const int in_part = target < 0 ? -kPartColumns : target < columns ? static_cast<int>(target) : 2 * kPartColumns;
  const int to_target = in_part - 2 * fragment.thread;

  if (args.raw != nullptr) keep_raw(args, fragment, left);
  transform(args.transform, fragment, left);
  float total = 0.0f;
  if (args.outputs & kMeanLogits) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) total += fragment_column(k) < left ? u[k] : 0.0f;
  }
  if (columns < kPartColumns) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) u[k] = fragment_column(k) < left ? u[k] : -INFINITY;
  }
  // Few threads have a target.
  if (0 <= to_target && to_target < kPartColumns && to_target % 8 < 2) {
    float of_target = 0.0f;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (fragment_column(k) == to_target) {
        of_target = u[k];
        u[k] = -INFINITY;
      }
    }
    args.state[kTarget * args.state_stride + fragment.row] = of_target;
  }
  float before = -INFINITY;
  if (args.outputs & kIsTop1) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) before = fmaxf(before, fragment_column(k) < to_target ? u[k] : -INFINITY);
  }

  float top = u[0];
#pragma unroll
  for (int k = 1; k < kSize; ++k) top = fmaxf(top, u[k]);
  top = quad_maximum(top);
  const float anchor = top == -INFINITY ? 0.0f : top;  // -inf - -inf is NaN
  if (args.words != nullptr) keep(args, fragment, anchor, columns);
  float sum = 0.0f, sum_x = 0.0f, sum_sq = 0.0f;
  if (args.outputs & (kEntropy | kLogSumSqProbs)) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const float x = u[k] - anchor, e = exp_flushed(x);
      sum += e;
      sum_x += e > 0.0f ? product(e, x) : e;  // not 0 * -inf
      sum_sq = fmaf(e, e, sum_sq);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += exp_flushed(u[k] - anchor);
  }

  float* slot = args.parts.first + fragment.part * args.parts.part_stride + fragment.row;
  const bool writes = there && fragment.thread == 0;
  const auto write = [&](float value) {
    if (writes) *slot = value;
    slot += args.parts.slot_stride;
  };
  write(top);
  write(quad_sum(sum));
  if (args.outputs & kEntropy) write(quad_sum(sum_x));
  if (args.outputs & kLogSumSqProbs) write(quad_sum(sum_sq));
  if (args.outputs & kMeanLogits) write(quad_sum(total));
  if (args.outputs & kIsTop1) write(quad_maximum(before));
}

}  // namespace
}  // namespace trl_fast
