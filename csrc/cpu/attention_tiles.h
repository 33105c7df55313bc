// What attention's kernels of one instruction set share: tiles of queries, blocks of keys, which of them see each
// other, and how they are packed and multiplied. In an unnamed namespace, once per translation unit.
#pragma once

#include "attention_kernels.h"
#include "microkernel.h"
#include "row_chunks.h"

namespace {

using trl_fast::AttentionArgs;
using trl_fast::AttentionHeads;
using trl_fast::AttentionMask;
using trl_fast::kKeyBlock;

// Rows of a strip: a tile of sums has so many.
constexpr int64_t kStrip = kTileRows < trl_fast::kMostStripRows ? 4 : trl_fast::kMostStripRows;
static_assert(kKeyBlock % kTileColumns == 0 && kKeyBlock % kStrip == 0 && kStrip <= kTileRows);
// e^x for x <= 80 as 2^(x log2 e), in fewer steps than exp_vec: a polynomial (Cephes exp2f) of the part behind the
// nearest integer. Its relative error grows to |x| / 2^24, which no longer counts where e^x is small beside e^0. What
// is below the normal range gives 0; NaN stays NaN.
inline Vec weight_vec(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23
  const Vec exponent = x * splat(1.44269504088896341f);
  const Vec shifted = exponent + magic;
  const Vec r = exponent - (shifted - magic);
  Vec p = splat(1.535336188319500e-4f) * r + splat(1.339887440266574e-3f);
  p = p * r + splat(9.618437357674640e-3f);
  p = p * r + splat(5.550332471162809e-2f);
  p = p * r + splat(2.402264791363012e-1f);
  p = p * r + splat(6.931472028550421e-1f);
  p = p * r + splat(1.0f);
  const Vec power = bits_as<Vec>((bits_as<UVec>(shifted) << 23) + bits_as<UVec>(splat(1.0f)));
  return exponent < splat(-126.0f) ? Vec{} : p * power;
}

int64_t whole_panels(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns * kTileColumns; }

// Gives pieces of a worker's scratch memory, each from a cache line's begin on; without memory, it counts.
struct Room {
  float* memory;
  int64_t used = 0;

  float* take(int64_t n) {
    float* const piece = memory ? memory + used : nullptr;
    used += (n + 15) / 16 * 16;
    return piece;
  }
};

// A left factor of a product, the columns of a matrix as it lies: a number a row and step.
struct TransposedLeft {
  const float* data;
  int64_t stride;
  float at(int row, int64_t step) const { return data[step * stride + row]; }
};

// Computes out (kStrip, columns) = left @ right or adds that to it; right: panels of kTileColumns columns that are
// panel_stride apart, from the first step on.
template <bool kAdds, typename Left>
inline void multiply_strip(Left left, const float* right, int64_t panel_stride, int64_t steps, int64_t columns,
                           float* out, int64_t out_stride) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    multiply_tile<kStrip, kAdds>(left, right + column / kTileColumns * panel_stride, steps, out + column, out_stride);
  }
}

// The same with a right factor as it lies, its rows the steps.
template <bool kAdds, typename Left>
inline void multiply_rows(Left left, const float* right, int64_t right_stride, int64_t steps, int64_t columns,
                          float* out, int64_t out_stride) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    multiply_tile<kStrip, kAdds>(left, right + column, steps, out + column, out_stride, right_stride);
  }
}

template <typename T>
inline T* row_of(const AttentionHeads& heads, int64_t head, int64_t token) {
  return static_cast<T*>(heads.data) + head * heads.head_stride + token * heads.token_stride;
}

// ---- which keys are seen

// Returns the keys of a block that a token sees.
uint64_t keys_seen(const AttentionMask& mask, int64_t token, int64_t block) {
  const int64_t first = block * kKeyBlock;
  uint64_t seen = 0;
  for (int64_t n = mask.first_segments[block]; n < mask.num_segments; ++n) {
    const trl_fast::TreeSegment& s = mask.segments[n];
    if (s.start >= first + kKeyBlock || s.start > token) break;
    if (token >= s.tree_end) continue;
    int64_t from = s.start + mask.positions[token] - mask.window + 1 - s.offset;
    from = std::max({std::min<int64_t>(from, mask.first_in_runs[token]), s.start, first}) - first;
    const int64_t to = std::min<int64_t>({s.end, mask.ends_of_runs[token], first + kKeyBlock}) - first;
    if (from < to) seen |= (~uint64_t{0} >> (kKeyBlock - (to - from))) << from;
  }
  return seen;
}

// Tokens of a tile, and their rows: row r is token r / group_size and head r % group_size, in whole strips.
struct Tile {
  int64_t first, tokens, rows, whole_rows;
};

Tile tile_of(const AttentionArgs& args, int64_t index) {
  const int64_t first = index * args.tile_tokens, tokens = std::min(args.tile_tokens, args.tokens - first);
  const int64_t rows = tokens * args.group_size;
  return {first, tokens, rows, (rows + kStrip - 1) / kStrip * kStrip};
}

int64_t most_rows(const AttentionArgs& args) {
  return (args.tile_tokens * args.group_size + kStrip - 1) / kStrip * kStrip;
}

bool sees(const AttentionArgs& args, int64_t index, int64_t block) {
  const Tile tile = tile_of(args, index);
  for (int64_t t = tile.first + tile.tokens; t-- > tile.first;) {
    if (keys_seen(args.mask, t, block)) return true;
  }
  return false;
}

// What the rows of a strip see of a block.
struct Seen {
  uint64_t by_row[kStrip];
  uint64_t any, all;

  // First and last + 1 of the keys that a row sees.
  int64_t begin() const { return __builtin_ctzll(any); }
  int64_t end() const { return kKeyBlock - __builtin_clzll(any); }
};

// Writes what each strip of a tile sees of a block; returns whether all rows see all keys.
bool look(const AttentionArgs& args, const Tile& tile, int64_t block, Seen* seen) {
  int64_t row = 0;
  uint64_t all = ~uint64_t{0};
  const auto add = [&](uint64_t keys) {
    Seen& strip = seen[row / kStrip];
    if (row % kStrip == 0) strip.any = 0, strip.all = ~uint64_t{0};
    strip.by_row[row % kStrip] = keys;
    strip.any |= keys;
    strip.all &= keys;
    all &= keys;
    ++row;
  };
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const uint64_t keys = keys_seen(args.mask, tile.first + t, block);
    for (int64_t head = 0; head < args.group_size; ++head) add(keys);
  }
  while (row < tile.whole_rows) add(0);
  return all == ~uint64_t{0};
}

// Columns of scores, whole panels, in which a strip sees keys.
struct Columns {
  int64_t begin, end;
  explicit Columns(const Seen& seen)
      : begin(seen.begin() / kTileColumns * kTileColumns), end(whole_panels(seen.end())) {}
};

// Puts `hidden` for the scores of keys from `column` on that a row does not see.
inline Vec only_seen(Vec scores, uint64_t seen, int64_t column, float hidden) {
  UVec lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = 1u << i;
  const UVec bits = UVec{} + static_cast<uint32_t>(seen >> column);
  return (bits & lanes) != UVec{} ? scores : splat(hidden);
}

// ---- packing

// Calls f(row, head, token) for the rows of a tile.
template <typename F>
inline void for_rows(const AttentionArgs& args, int64_t group, const Tile& tile, F f) {
  int64_t row = 0;
  for (int64_t token = tile.first; token < tile.first + tile.tokens; ++token) {
    for (int64_t n = 0; n < args.group_size; ++n) f(row++, group * args.group_size + n, token);
  }
}

// Widens a tile's rows of (heads, T, width) to (whole_rows, stride), with zeros for what is missing.
template <typename T>
void gather(const AttentionArgs& args, const AttentionHeads& heads, int64_t group, const Tile& tile, int64_t width,
            int64_t stride, float* to) {
  for_rows(args, group, tile, [&](int64_t row, int64_t head, int64_t token) {
    widen_chunk(row_of<const T>(heads, head, token), width, 0.0f, to + row * stride);
    std::fill(to + row * stride + padded(width), to + (row + 1) * stride, 0.0f);
  });
  std::fill(to + tile.rows * stride, to + tile.whole_rows * stride, 0.0f);
}

// Keys or values of a block as right factor: kAsColumns, its tokens are the columns (kKeyBlock of them), else the
// steps.
template <bool kAsColumns, typename T>
void pack_block(const AttentionArgs& args, const AttentionHeads& heads, int64_t group, int64_t block, int64_t width,
                float* to) {
  const int64_t first = block * kKeyBlock, tokens = std::min(kKeyBlock, args.tokens - first);
  const T* data = row_of<T>(heads, group, first);
  if constexpr (kAsColumns) {
    pack_right(Factor<T>{data, heads.token_stride, 1, tokens, width}, to);
    if (tokens <= kKeyBlock - kTileColumns) {
      std::fill(to + whole_panels(tokens) * width, to + kKeyBlock * width, 0.0f);
    }
  } else {
    pack_right(Factor<T>{data, 1, heads.token_stride, width, tokens}, to);
  }
}

}  // namespace
