// Attention over a row of token trees by tiles of bfloat16: the output, by the online softmax of
// attention_kernels.cpp.
//
// Weights are rounded to be multiplied. An output is divided by the sum of the rounded ones, so that only their shares
// are off; the log-sum-exp is that of the others.
#pragma once

#include "attention_bands.h"

namespace {

// As in attention_kernels.cpp, but exponents of two.
constexpr float kSlack = 8.0f;
constexpr float kLowest = -1e38f;
constexpr double kLn2 = 0.693147180559945309;

// ---- packing

int64_t packed_size(const AttentionArgs& args, int64_t width) {
  return args.groups * args.key_places * whole_bands(width) / 2;
}

int64_t packed_keys_size(const AttentionArgs& args) { return packed_size(args, args.width); }

int64_t packed_values_size(const AttentionArgs& args) { return packed_size(args, args.value_width); }

BFloat16* packed_block(const AttentionArgs& args, float* packed, int64_t group, const KeyBlock& block, int64_t width) {
  return reinterpret_cast<BFloat16*>(packed) + (group * args.key_places + block.place) * whole_bands(width);
}

void pack(const AttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t group = n / args.num_blocks;
    const KeyBlock& block = args.plan.blocks[n % args.num_blocks];
    pack_tiles<true>(args.key, group, block, args.width,
                     packed_block(args, args.packed_keys, group, block, args.width));
    pack_tiles<false>(args.value, group, block, args.value_width,
                      packed_block(args, args.packed_values, group, block, args.value_width));
  }
}

// ---- forward

// Rows of a tile while it goes over its blocks.
struct Softmax {
  BFloat16* query;      // (rows, key_width)
  BFloat16* weights;    // (rows, kKeyBlock)
  float* scores;        // (rows, kKeyBlock)
  float* out;           // (rows, value_width), relative to 2^top
  float* tops;          // (rows,) what exponents are relative to
  float* sums;          // (rows, kWidth) of weights
  float* rounded_sums;  // (rows, kWidth) of weights as they multiply values
  Seen* seen;           // of each strip
  int64_t key_width, value_width;
};

Softmax forward_room(const AttentionArgs& args, Room& room) {
  const int64_t rows = band_rows(args);
  Softmax s;
  s.key_width = whole_bands(args.width);
  s.value_width = whole_bands(args.value_width);
  s.query = take_narrow(room, rows * s.key_width);
  s.weights = take_narrow(room, rows * kKeyBlock);
  s.scores = room.take(rows * kKeyBlock);
  s.out = room.take(rows * s.value_width);
  s.tops = room.take(rows);
  s.sums = room.take(rows * kWidth);
  s.rounded_sums = room.take(rows * kWidth);
  s.seen = take_seen(room, rows);
  return s;
}

// A strip's scores and weights: of rows from `row` of the tile on, of the band's columns [begin, end).
struct StripAtWork {
  const Seen& seen;
  int64_t row;
  float* scores;
  BFloat16* weights;
  int64_t begin, end;
};

void cap(const StripAtWork& at, float inner, float softcap) {
  for (int64_t r = 0; r < kStrip; ++r) {
    for (int64_t i = at.begin; i < at.end; i += kWidth) {
      float* const x = at.scores + r * kKeyBlock + i;
      store(x, tanh_vec(load(x) * splat(inner)).value * splat(softcap));
    }
  }
}

// The largest exponent in each lane of what a row sees.
template <bool kMasked>
inline Vec largest_exponent(const StripAtWork& at, int64_t r, Vec factor) {
  Vec largest = splat(-kInf);
  for (int64_t i = at.begin; i < at.end; i += kWidth) {
    Vec x = load(at.scores + r * kKeyBlock + i) * factor;
    if constexpr (kMasked) x = only_seen(x, at.seen.by_row[r], i, -kInf);
    largest = maximum(x, largest);
  }
  return largest;
}

// Raises the tops of a strip's rows to their largest exponent.
template <bool kMasked>
void raise_tops(const Softmax& state, const StripAtWork& at, Vec exponent) {
  for (int64_t r = 0; r < at.seen.rows; ++r) {
    float& top = state.tops[at.row + r];
    const float raised = max_of(largest_exponent<kMasked>(at, r, exponent));
    if (!(raised > top)) continue;
    const Vec factor = power_of_two(splat(top - raised));
    const bool is_first = top == kLowest;
    top = raised;
    if (is_first) continue;  // all sums are 0
    const auto scale = [&](float* x, int64_t n) {
      for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * factor);
    };
    scale(state.sums + (at.row + r) * kWidth, kWidth);
    scale(state.rounded_sums + (at.row + r) * kWidth, kWidth);
    scale(state.out + (at.row + r) * state.value_width, state.value_width);
  }
}

// Turns a strip's scores into weights relative to its tops, and adds them up.
template <bool kMasked>
void compute_weights(const Softmax& state, const StripAtWork& at, Vec exponent) {
  Vec excess = splat(kLowest);
  for (int64_t r = 0; r < kStrip; ++r) {
    excess = maximum(largest_exponent<kMasked>(at, r, exponent) - splat(state.tops[at.row + r]), excess);
  }
  if (max_of(excess) > kSlack) raise_tops<kMasked>(state, at, exponent);
  for (int64_t r = 0; r < kStrip; ++r) {
    const float* const scores = at.scores + r * kKeyBlock;
    const Vec top = splat(state.tops[at.row + r]);
    const auto weights_from = [&](int64_t i) {
      const Vec weights = power_of_two(load(scores + i) * exponent - top);
      return kMasked ? only_seen(weights, at.seen.by_row[r], i, 0.0f) : weights;
    };
    float* const sums = state.sums + (at.row + r) * kWidth;
    float* const rounded_sums = state.rounded_sums + (at.row + r) * kWidth;
    Vec sum = load(sums), rounded_sum = load(rounded_sums);
    for (int64_t i = at.begin; i < at.end; i += 2 * kWidth) {
      const Vec a = weights_from(i), b = weights_from(i + kWidth);
      sum += a + b;
      rounded_sum = narrow_and_add(at.weights + r * kKeyBlock + i, a, b, rounded_sum);
    }
    store(sums, sum);
    store(rounded_sums, rounded_sum);
  }
}

// Calls f(row, rows, strips, what is seen) for the bands of a tile that see something.
template <typename F>
inline void for_bands(const Tile& tile, const Seen* seen, F f) {
  for (int64_t row = 0; row < tile.rows; row += kBand) {
    const BandSeen band(seen + row / kStrip);
    if (band.any) f(row, std::min(kBand, tile.rows - row), seen + row / kStrip, band);
  }
}

// All bands are multiplied before any of them goes on: tiles that were just written are slow to read.
void attend_block(const AttentionArgs& args, const Softmax& state, const Tile& tile, const BFloat16* keys,
                  const BFloat16* values) {
  const ScoreFactors factors(args);
  for_bands(tile, state.seen, [&](int64_t row, int64_t rows, const Seen*, const BandSeen& band) {
    multiply_tiles<false>(rows, band_of(state.query, row, state.key_width),
                          columns_from(band.begin(), keys, args.width), band.end() - band.begin(),
                          state.key_width / kSteps, state.scores + row * kKeyBlock + band.begin(), kKeyBlock);
  });
  for_bands(tile, state.seen, [&](int64_t band_row, int64_t rows, const Seen* seen, const BandSeen& band) {
    for (int64_t n = 0; n < kStrips && n * kStrip < rows; ++n) {
      const int64_t row = band_row + n * kStrip, from = row * kKeyBlock;
      const StripAtWork at = {seen[n], row, state.scores + from, state.weights + from, band.begin(), band.end()};
      if (args.softcap) cap(at, factors.inner, args.softcap);
      (sees_all(seen[n]) ? compute_weights<false> : compute_weights<true>)(state, at, splat(factors.exponent));
    }
  });
  for_bands(tile, state.seen, [&](int64_t row, int64_t rows, const Seen*, const BandSeen& band) {
    multiply_tiles<true>(rows, band_of(state.weights + band.begin(), row, kKeyBlock),
                         steps_from(band.begin(), values, args.value_width), state.value_width,
                         (band.end() - band.begin()) / kSteps, state.out + row * state.value_width, state.value_width);
  });
}

void forward(const AttentionArgs& args, int64_t task, float* scratch) {
  const int64_t group = task % args.groups, index = args.num_tiles - 1 - task / args.groups;
  const Tile tile = tile_of(args, index);
  const int64_t rows = whole_bands(tile.rows);
  const TileSession session;
  Room room{scratch};
  const Softmax state = forward_room(args, room);
  gather_rows(args, args.query, group, tile, args.width, state.query);
  std::fill(state.out, state.out + rows * state.value_width, 0.0f);
  std::fill(state.sums, state.sums + rows * kWidth, 0.0f);
  std::fill(state.rounded_sums, state.rounded_sums + rows * kWidth, 0.0f);
  std::fill(state.tops, state.tops + rows, kLowest);
  clear_last_strips(tile, state.seen);
  for (int64_t n = args.plan.tile_offsets[index]; n < args.plan.tile_offsets[index + 1]; ++n) {
    const KeyBlock& block = args.plan.blocks[args.plan.tile_blocks[n]];
    look(args, tile, block, state.seen);
    const BFloat16* const keys = packed_block(args, args.packed_keys, group, block, args.width);
    const BFloat16* const values = packed_block(args, args.packed_values, group, block, args.value_width);
    attend_block(args, state, tile, keys, values);
  }
  for_rows(args, group, tile, [&](int64_t row, int64_t head, int64_t token) {
    const float sum = static_cast<float>(sum_of(load(state.sums + row * kWidth)));
    const float log2 = state.tops[row] + std::log2(sum);
    args.lse[head * args.tokens + token] = static_cast<float>(log2 * kLn2);
    const Vec share = splat(static_cast<float>(1.0 / sum_of(load(state.rounded_sums + row * kWidth))));
    const float* const out = state.out + row * state.value_width;
    for (int64_t i = 0; i < args.value_width; i += kWidth) {
      narrow_part(load(out + i) * share, args.value_width - i, row_of<BFloat16>(args.out, head, token) + i);
    }
  });
}

}  // namespace
