// Attention over a row of token trees by tiles of bfloat16: the gradients, from the log-sum-exp.
//
// Gradients of keys and values are summed transposed, a channel a row: then weights and gradients of scores are right
// factors whose steps are the tile's rows, and the instruction that rounds two rows packs them.
#pragma once

#include "attention_bands.h"

namespace {

using trl_fast::kSpanBlocks;

// Tiles of a block's keys in a band's packed weights.
constexpr int64_t kKeyTiles = kKeyBlock / kLanes;

// Sums gradient times output of each row as products of gradients and values are summed: a token that sees one key has
// that one's value as output, and the gradient of its score is exactly 0.
void prepare_backward(const AttentionArgs& args, int64_t begin, int64_t end) {
  alignas(64) BFloat16 grads[kTileNumbers], outs[kTileNumbers];
  alignas(64) float sums[kLanes * kLanes];
  const TileSession session;
  for (int64_t head = 0; head < args.groups * args.group_size; ++head) {
    for (int64_t token = begin; token < end; token += kLanes) {
      const int64_t lanes = std::min(kLanes, end - token);
      _tile_zero(0);
      for (int64_t channel = 0; channel < args.value_width; channel += kSteps) {
        const int64_t steps = args.value_width - channel;
        pack_lane_rows<true>(row_of<const BFloat16>(args.grad, head, token) + channel, args.grad.token_stride, lanes,
                             steps, grads);
        pack_lane_rows<false>(row_of<const BFloat16>(args.out, head, token) + channel, args.out.token_stride, lanes,
                              steps, outs);
        finish_writes();
        _tile_loadd(4, grads, 64);
        _tile_loadd(6, outs, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, sums, 64);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        args.deltas[head * args.tokens + token + lane] = sums[lane * (kLanes + 1)];
      }
    }
  }
}

// What one block of keys needs.
struct BlockAtWork {
  BFloat16* keys;           // right factors: tokens as columns,
  BFloat16* values;         //
  BFloat16* keys_as_steps;  // and as steps
  float* grad_key;          // (key_width, kKeyBlock)
  float* grad_value;        // (value_width, kKeyBlock)
};

// What the blocks of a span need, and the tile at work.
struct Backward {
  BlockAtWork blocks[kSpanBlocks];
  BFloat16* query;                 // (rows, key_width)
  BFloat16* grad;                  // (rows, value_width)
  BFloat16* query_as_steps;        // left factors: channels as lanes, rows as steps
  BFloat16* grad_as_steps;         //
  float* scores;                   // (kBand, kKeyBlock)
  float* grad_weights;             // (kBand, kKeyBlock)
  BFloat16* grad_scores;           // (kBand, kKeyBlock)
  BFloat16* weights_as_steps;      // right factors: keys as lanes, rows as steps
  BFloat16* grad_scores_as_steps;  //
  TileGradients gradients;         // log-sum-exps as exponents of two
  int64_t key_width, value_width;
};

Backward backward_room(const AttentionArgs& args, Room& room) {
  const int64_t rows = band_rows(args);
  Backward b;
  b.key_width = whole_bands(args.width);
  b.value_width = whole_bands(args.value_width);
  for (BlockAtWork& block : b.blocks) {
    block.keys = take_narrow(room, kKeyBlock * b.key_width);
    block.values = take_narrow(room, kKeyBlock * b.value_width);
    block.keys_as_steps = take_narrow(room, kKeyBlock * b.key_width);
    block.grad_key = room.take(kKeyBlock * b.key_width);
    block.grad_value = room.take(kKeyBlock * b.value_width);
  }
  b.query = take_narrow(room, rows * b.key_width);
  b.grad = take_narrow(room, rows * b.value_width);
  b.query_as_steps = take_narrow(room, rows * b.key_width);
  b.grad_as_steps = take_narrow(room, rows * b.value_width);
  b.scores = room.take(kBand * kKeyBlock);
  b.grad_weights = room.take(kBand * kKeyBlock);
  b.grad_scores = take_narrow(room, kBand * kKeyBlock);
  b.weights_as_steps = take_narrow(room, rows * kKeyBlock);
  b.grad_scores_as_steps = take_narrow(room, rows * kKeyBlock);
  b.gradients = tile_gradients_room(room, rows, b.key_width);
  return b;
}

void begin_block(const AttentionArgs& args, int64_t group, const KeyBlock& block, const Backward& b,
                 const BlockAtWork& at_work) {
  pack_tiles<true>(args.key, group, block, args.width, at_work.keys);
  pack_tiles<true>(args.value, group, block, args.value_width, at_work.values);
  pack_tiles<false>(args.key, group, block, args.width, at_work.keys_as_steps);
  std::fill(at_work.grad_key, at_work.grad_key + kKeyBlock * b.key_width, 0.0f);
  std::fill(at_work.grad_value, at_work.grad_value + kKeyBlock * b.value_width, 0.0f);
}

// Writes a block's gradient (width, kKeyBlock), times a factor, to its tokens' rows.
void write_transposed(const float* from, float factor, int64_t width, int64_t group, const KeyBlock& block,
                      const AttentionHeads& to) {
  for (int64_t key = 0; key < block.tokens; key += kWidth) {
    for (int64_t channel = 0; channel < width; channel += kWidth) {
      Vec rows[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) rows[i] = load(from + (channel + i) * kKeyBlock + key) * splat(factor);
      transpose(rows);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, block.tokens - key); ++i) {
        narrow_part(rows[i], width - channel, row_of<BFloat16>(to, group, block.first + key + i) + channel);
      }
    }
  }
}

void end_block(const AttentionArgs& args, int64_t group, const KeyBlock& block, const BlockAtWork& at_work) {
  write_transposed(at_work.grad_key, args.scale, args.width, group, block, args.grad_key);
  write_transposed(at_work.grad_value, 1.0f, args.value_width, group, block, args.grad_value);
}

// Packs rows (rows, width) as left factor whose lanes are channels: tiles in the order of channels and, of each, rows.
void pack_as_steps(const BFloat16* rows, int64_t num_rows, int64_t width, BFloat16* to) {
  for (int64_t channel = 0; channel < width; channel += kLanes) {
    for (int64_t row = 0; row < num_rows; row += kSteps, to += kTileNumbers) {
      pack_step_rows<true>(rows + row * width + channel, width, kLanes, kSteps, to);
    }
  }
}

void load_tile(const AttentionArgs& args, const Backward& b, const Tile& tile, int64_t group) {
  const int64_t rows = whole_bands(tile.rows);
  gather_rows(args, args.query, group, tile, args.width, b.query);
  gather_rows(args, args.grad, group, tile, args.value_width, b.grad);
  pack_as_steps(b.query, rows, b.key_width, b.query_as_steps);
  pack_as_steps(b.grad, rows, b.value_width, b.grad_as_steps);
  begin_tile(args, group, tile, rows, kLog2OfE, b.gradients);
  clear_last_strips(tile, b.gradients.seen);
}

// A strip's scores: of rows from `row` of the tile on, `inside` of its band, of the band's columns [begin, end).
struct StripBackward {
  const Seen& seen;
  int64_t row, inside, begin, end;
};

// Computes two vectors of a row's weights and of the gradient of its scores from the products that stand there.
template <bool kCapped, bool kMasked>
inline void differentiate_row(const AttentionArgs& args, const Backward& b, const StripBackward& at, int64_t r,
                              int64_t column, const ScoreFactors& factors, Vec (&weights)[2], Vec (&by_scores)[2]) {
  const int64_t place = (at.inside + r) * kKeyBlock + column;
  const Vec lse = splat(b.gradients.lse[at.row + r]), delta = splat(b.gradients.deltas[at.row + r]);
  for (int v = 0; v < 2; ++v) {
    Vec scores = load(b.scores + place + v * kWidth), derivative = splat(1.0f);
    if constexpr (kCapped) {
      const Tanh tanh = tanh_vec(scores * splat(factors.inner));
      scores = tanh.value * splat(args.softcap);
      derivative = tanh.derivative;
    }
    weights[v] = power_of_two(scores * splat(factors.exponent) - lse);
    by_scores[v] = weights[v] * (load(b.grad_weights + place + v * kWidth) - delta);
    if constexpr (kCapped) by_scores[v] *= derivative;
    if constexpr (kMasked) {
      weights[v] = only_seen(weights[v], at.seen.by_row[r], column + v * kWidth, 0.0f);
      by_scores[v] = only_seen(by_scores[v], at.seen.by_row[r], column + v * kWidth, 0.0f);
    }
  }
  narrow_and_add(b.grad_scores + place, by_scores[0], by_scores[1], Vec{});
}

// Computes a strip's weights and the gradient of its scores, as what they are multiplied as.
template <bool kCapped, bool kMasked>
void differentiate(const AttentionArgs& args, const Backward& b, const StripBackward& at) {
  const ScoreFactors factors(args);
  for (int64_t r = 0; r < kStrip; r += 2) {
    const int64_t band = at.row / kBand, pair = (at.inside + r) / 2;
    for (int64_t column = at.begin; column < at.end; column += 2 * kWidth) {
      Vec weights[2][2], by_scores[2][2];
      for (int n = 0; n < 2; ++n) {
        differentiate_row<kCapped, kMasked>(args, b, at, r + n, column, factors, weights[n], by_scores[n]);
      }
      for (int v = 0; v < 2; ++v) {
        const int64_t key = column + v * kWidth;
        const int64_t place = (band * kKeyTiles + key / kLanes) * kTileNumbers + 2 * (pair * kLanes + key % kLanes);
        narrow_to_words(b.weights_as_steps + place, weights[0][v], weights[1][v]);
        narrow_to_words(b.grad_scores_as_steps + place, by_scores[0][v], by_scores[1][v]);
      }
    }
  }
}

// Computes the weights of a band and the gradient of its scores, and adds the block's share of that of its queries.
void differentiate_band(const AttentionArgs& args, const Backward& b, int64_t row, int64_t rows,
                        const BlockAtWork& block) {
  const Seen* const seen = b.gradients.seen + row / kStrip;
  const BandSeen band(seen);
  if (!band.any) return;
  const int64_t begin = band.begin(), size = band.end() - begin;
  multiply_tiles<false>(rows, band_of(b.query, row, b.key_width), columns_from(begin, block.keys, args.width), size,
                        b.key_width / kSteps, b.scores + begin, kKeyBlock);
  multiply_tiles<false>(rows, band_of(b.grad, row, b.value_width), columns_from(begin, block.values, args.value_width),
                        size, b.value_width / kSteps, b.grad_weights + begin, kKeyBlock);
  for (int64_t n = 0; n < kStrips; ++n) {
    const StripBackward at = {seen[n], row + n * kStrip, n * kStrip, begin, band.end()};
    const bool all = sees_all(seen[n]);
    const auto plain = all ? differentiate<false, false> : differentiate<false, true>;
    const auto capped = all ? differentiate<true, false> : differentiate<true, true>;
    (args.softcap ? capped : plain)(args, b, at);
  }
  multiply_tiles<true>(rows, band_of(b.grad_scores + begin, 0, kKeyBlock),
                       steps_from(begin, block.keys_as_steps, args.width), b.key_width, size / kSteps,
                       b.gradients.query + row * b.key_width, b.key_width);
}

// Adds a tile's share of the gradients of a block's keys and values. Bands that see some of a block's keys follow one
// another: neither begin nor end of what a token sees lies before that of an earlier token, as no runs overlap.
void add_to_keys(const Backward& b, const Tile& tile, const BlockAtWork& block) {
  const int64_t bands = whole_bands(tile.rows) / kBand;
  const auto add = [&](const BFloat16* left, const BFloat16* right, int64_t key, int64_t begin, int64_t end,
                       int64_t width, float* out) {
    const RightTiles weights = {right + (begin * kKeyTiles + key / kLanes) * kTileNumbers, kKeyTiles * kTileNumbers,
                                kTileNumbers};
    for (int64_t channel = 0; channel < width; channel += kBand) {
      const BFloat16* const rows = left + (channel / kLanes * bands + begin) * kTileNumbers;
      multiply_tiles<true>(kBand, LeftTiles{rows, kSteps, kTileNumbers, bands * kTileNumbers}, weights, kBand,
                           end - begin, out + channel * kKeyBlock + key, kKeyBlock);
    }
  };
  for (int64_t key = 0; key < kKeyBlock; key += kBand) {
    int64_t begin = 0, end = bands;
    while (begin < end && !BandSeen(b.gradients.seen + begin * kStrips).sees(key)) ++begin;
    while (begin < end && !BandSeen(b.gradients.seen + (end - 1) * kStrips).sees(key)) --end;
    if (begin == end) continue;
    add(b.grad_as_steps, b.weights_as_steps, key, begin, end, b.value_width, block.grad_value);
    add(b.query_as_steps, b.grad_scores_as_steps, key, begin, end, b.key_width, block.grad_key);
  }
}

void backward(const AttentionArgs& args, int64_t task, float* scratch) {
  const TileSession session;
  Room room{scratch};
  const Backward b = backward_room(args, room);
  for_span(
      args, task, b.gradients,
      [&](int64_t group, const KeyBlock& block, int64_t n) { begin_block(args, group, block, b, b.blocks[n]); },
      [&](int64_t group, const Tile& tile) { load_tile(args, b, tile, group); },
      [&](const Tile& tile, const KeyBlock&, int64_t n) {
        for (int64_t row = 0; row < tile.rows; row += kBand) {
          differentiate_band(args, b, row, std::min(kBand, tile.rows - row), b.blocks[n]);
        }
        add_to_keys(b, tile, b.blocks[n]);
      },
      [&](int64_t group, const KeyBlock& block, int64_t n) { end_block(args, group, block, b.blocks[n]); });
}

}  // namespace
