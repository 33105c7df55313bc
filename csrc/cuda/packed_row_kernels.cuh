// The row kernels of packed logits for CUDA: row_scores packs what it reads, row_grad unpacks.
//
// The format is specified by trl_fast/ops/head/kept_logits.py. A chunk is what a block reads at once, so that its
// largest logit is known while its logits are still in registers: four bytes of a logit are read, two are written.
#pragma once

#include <cstring>

#include "cuda/row_kernels.cuh"

namespace trl_fast {
namespace {

__device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ inline uint16_t packed_word(float u, float top) {
  const float steps = product(top - u, kPackedSteps);
  const float limit = steps < INFINITY ? kLowestCode : kMinusInfCode;  // NaN is not below
  const float code = steps < limit ? steps : limit;
  return static_cast<uint16_t>(bits_of(code + kIntegers));
}

__device__ inline float unpacked_logit(uint16_t word, float top) {
  const float code = float_of(bits_of(kIntegers) | word) - kIntegers;
  return code == kMinusInfCode ? -INFINITY : fmaf(code, -1 / kPackedSteps, top);  // the product is exact
}

// Where a packed row lies.
struct PackedPointers {
  uint16_t* words;
  float* tops;

  __device__ PackedPointers(const PackedRows& packed, int64_t row)
      : words(packed.first.words + row * packed.words_stride), tops(packed.first.tops + row * packed.tops_stride) {}
};

// One block a row.
template <bool kBias, int kOutputs>
__global__ void __launch_bounds__(kThreads) row_scores_packed_kernel(ScoreArgs args, PackedRows packed) {
  const float* logits = logits_of_block<float>(args.tile);
  const PackedPointers row(packed, blockIdx.x);
  const int columns = static_cast<int>(args.tile.columns);
  const auto score = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    score_row<float, kBias, false, kOutputs, kWhole>(args, logits, [&](int start, const float (&u)[kShare]) {
      float top = -INFINITY;
      for (int k = 0; k < kShare; ++k) top = fmaxf(top, u[k]);
      const int chunk = start / kPackedChunk;
      top = block_maximum(top, chunk % 2);
      Share<uint16_t> share;
      for (int k = 0; k < kShare; ++k) share[k] = packed_word(u[k], top);
      store_share<kWhole>(row.words, start + threadIdx.x * kShare, columns, share);
      if (threadIdx.x == 0) row.tops[chunk] = top;
    });
  };
  if (has_whole_shares(logits, columns) && has_whole_shares(row.words, columns)) {
    score(std::true_type{});
  } else {
    score(std::false_type{});
  }
}

// Blocks (row, chunks of it). Each element depends on itself only, so a 16-bit `out` may be the words.
template <typename Out>
__global__ void __launch_bounds__(kThreads) row_grad_packed_kernel(GradArgs args, PackedRows packed) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(args.tile.columns);
  const PackedPointers from(packed, packed.index ? packed.index[row] : row);
  Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
  const int target = local_target(args.tile, row);
  const float derivative = args.transform.scale * args.transform.inv_temperature;
  const Coefficients coefficients(args, row);
  const auto grad_at = [&](uint16_t word, float top, int column, Out& to) {
    narrow(coefficients.grad({unpacked_logit(word, top), derivative}, column == target), to);
  };
  constexpr int kChunk = kPackedChunk;
  const int start = blockIdx.y * kBatch * kChunk;
  if (!has_whole_shares(from.words, columns) || !has_whole_shares(out, columns)) {
    const int end = columns - start < kBatch * kChunk ? columns : start + kBatch * kChunk;
#pragma unroll 1
    for (int column = start + threadIdx.x; column < end; column += kThreads) {
      grad_at(from.words[column], from.tops[column / kChunk], column, out[column]);
    }
    return;
  }
  const int first = start + threadIdx.x * kShare;
  Share<uint16_t> batch[kBatch];
  float tops[kBatch];
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    if (first + k * kChunk >= columns) break;
    batch[k] = load_share<true>(from.words, first + k * kChunk, columns);
    tops[k] = from.tops[start / kChunk + k];
  }
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const int column = first + k * kChunk;
    if (column >= columns) break;
    Share<Out> grads;
    for (int j = 0; j < kShare; ++j) grad_at(batch[k][j], tops[k], column + j, grads[j]);
    store_share<true>(out, column, columns, grads);
  }
}

// Calls launch(kernel, grid) with the instance that serves `args`; both do nothing for an empty tile.
template <typename Launch>
void dispatch_scores_packed(const ScoreArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.tile.columns == 0) return;
  const dim3 grid(static_cast<unsigned>(rows));
  with_flag(args.transform.bias != nullptr, [&](auto bias) {
    with_outputs(args.outputs, [&](auto outputs) {
      launch(row_scores_packed_kernel<decltype(bias)::value, decltype(outputs)::value>, grid);
    });
  });
}

template <typename Launch>
void dispatch_grad_packed(const GradArgs& args, int64_t rows, Launch launch) {
  if (rows == 0 || args.tile.columns == 0) return;
  const int64_t chunks = num_chunks(args.tile.columns);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((chunks + kBatch - 1) / kBatch));
  with_dtype(args.out_dtype, [&](auto grad) { launch(row_grad_packed_kernel<decltype(grad)>, grid); });
}

}  // namespace
}  // namespace trl_fast
