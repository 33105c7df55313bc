// Merges attention over two sets of keys for CUDA; trl_fast/ops/attention_merge.py specifies it.
//
// A block takes some tokens of one head, whose log-sum-exps lie together. It reads both outputs once, sixteen bytes at
// a time, and writes the merged one. No torch headers: the same source compiles as host C++ (tests/support/simt.h).
#pragma once

#include <algorithm>

#include "cuda/attention_merge.h"
#include "cuda/layer_rows.cuh"

namespace trl_fast {
namespace {

// Tokens of a thread, side by side: what it loads of them is under way at once.
constexpr int kMergedTokens = 2;

// The second set's share of the softmax over both, by their log-sum-exps: PyTorch's sigmoid, as it is rounded there.
__device__ inline float share_of_second(float first, float second) {
  const bool has_keys = first != -INFINITY || second != -INFINITY;  // -inf - -inf is NaN
  return has_keys ? 1.0f / (1.0f + expf(first - second)) : 0.0f;
}

// The log-sum-exp of both: PyTorch's logaddexp.
__device__ inline float add_exps(float first, float second) {
  const bool are_same = first == second;  // infinite ones, too
  return fmaxf(first, second) + log1pf(expf(are_same ? 0.0f : -fabsf(first - second)));
}

// Both sets' channels by the second's share: PyTorch's lerp. What has no share is not looked at.
template <typename T>
__device__ inline Pack<T> merge_packs(Pack<T> first, Pack<T> second, float share) {
  const bool is_small = share < 0.5f;
  Pack<T> merged;
  for (int k = 0; k < Pack<T>::kSize; ++k) {
    const float x = to_float(first[k]), y = to_float(second[k]);
    narrow(fmaf(is_small ? share : share - 1.0f, y - x, is_small ? x : y), merged[k]);
  }
  if (share == 0.0f) merged.words = first.words;
  if (share == 1.0f) merged.words = second.words;
  return merged;
}

// A pack of a row of so many columns, zeros behind them. kWhole: the row is made of packs.
template <bool kWhole, typename T>
__device__ inline Pack<T> load_pack(const T* row, int64_t column, int64_t columns) {
  Pack<T> pack{};
  if constexpr (kWhole) {
    if (column < columns) pack = *reinterpret_cast<const Pack<T>*>(row + column);
  } else {
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      if (column + k < columns) pack[k] = row[column + k];
    }
  }
  return pack;
}

template <bool kWhole, typename T>
__device__ inline void store_pack(Pack<T> pack, int64_t column, int64_t columns, T* row) {
  if constexpr (kWhole) {
    if (column < columns) store_words(row + column, pack.words);
  } else {
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      if (column + k < columns) row[column + k] = pack[k];
    }
  }
}

// A pack of a token's channels belongs to a thread, all of them to 2^lane_bits threads, and further ones to blocks
// along y.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) attention_merge_kernel(AttentionMergeArgs args, int lane_bits) {
  const AttentionOutput &first = args.first, &second = args.second;
  const unsigned heads = static_cast<unsigned>(args.heads);
  const int64_t head = blockIdx.x % heads;
  const int side_by_side = kThreads >> lane_bits, lane = threadIdx.x & ((1 << lane_bits) - 1);
  const int64_t column = ((int64_t{blockIdx.y} << lane_bits) + lane) * Pack<T>::kSize;
  const int64_t begin = int64_t{blockIdx.x / heads} * kMergedTokens * side_by_side + (threadIdx.x >> lane_bits);
  int64_t places[kMergedTokens];
  // -inf of what is not there.
  float lses[kMergedTokens], second_lses[kMergedTokens];
  Pack<T> packs[kMergedTokens], second_packs[kMergedTokens];
#pragma unroll
  for (int i = 0; i < kMergedTokens; ++i) {
    const int64_t token = begin + i * side_by_side, columns = token < args.tokens ? args.width : 0;
    places[i] = token < args.tokens ? args.place[token] : -1;
    lses[i] = token < args.tokens ? first.lse[head * first.lse_stride + token] : -INFINITY;
    const T* row = static_cast<const T*>(first.out) + token * first.token_stride + head * first.head_stride;
    packs[i] = load_pack<kWhole>(row, column, columns);
  }
#pragma unroll
  for (int i = 0; i < kMergedTokens; ++i) {
    const int64_t place = places[i], columns = place >= 0 ? args.width : 0;
    second_lses[i] = place >= 0 ? second.lse[head * second.lse_stride + place] : -INFINITY;
    const T* row = static_cast<const T*>(second.out) + place * second.token_stride + head * second.head_stride;
    second_packs[i] = load_pack<kWhole>(row, column, columns);
  }
#pragma unroll
  for (int i = 0; i < kMergedTokens; ++i) {
    const int64_t token = begin + i * side_by_side;
    if (token >= args.tokens) return;
    const float share = share_of_second(lses[i], second_lses[i]);
    T* to = static_cast<T*>(args.merged) + (token * args.heads + head) * args.width;
    store_pack<kWhole>(merge_packs(packs[i], second_packs[i], share), column, args.width, to);
    if (column > 0) continue;
    args.merged_lse[head * args.tokens + token] = add_exps(lses[i], second_lses[i]);
  }
}

// Whether all rows are made of packs.
template <typename T>
bool in_packs(const AttentionMergeArgs& args) {
  const auto are_aligned = [](const AttentionOutput& from) {
    return is_aligned<T>(from.out, from.token_stride) && is_aligned<T>(from.out, from.head_stride);
  };
  return is_aligned<T>(args.merged, args.width) && are_aligned(args.first) && are_aligned(args.second);
}

// Calls launch(kernel, grid, arguments...), unless there is nothing to compute.
template <typename Launch>
void dispatch_attention_merge(const AttentionMergeArgs& args, Launch launch) {
  if (args.tokens == 0 || args.heads == 0) return;
  with_type(args.dtype, [&](auto type) {
    using T = type_of<decltype(type)>;
    int lane_bits = 0;
    while (kThreads >> lane_bits > 1 && int64_t{Pack<T>::kSize} << lane_bits < args.width) ++lane_bits;
    dim3 grid = grid_of(ceil_div(args.tokens, kMergedTokens * (kThreads >> lane_bits)) * args.heads);
    grid.y = static_cast<unsigned>(std::max<int64_t>(ceil_div(args.width, int64_t{Pack<T>::kSize} << lane_bits), 1));
    with_constant(in_packs<T>(args),
                  [&](auto whole) { launch(attention_merge_kernel<T, whole.value>, grid, args, lane_bits); });
  });
}

}  // namespace
}  // namespace trl_fast
