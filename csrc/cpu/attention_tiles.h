// What attention's kernels of one instruction set share: tiles of queries, blocks of keys, which of them see each
// other, and how they are packed and multiplied. In an unnamed namespace, once per translation unit.
#pragma once

#include <sched.h>

#include "attention_kernels.h"
#include "microkernel.h"
#include "row_chunks.h"

namespace {

using trl_fast::AttentionArgs;
using trl_fast::AttentionHeads;
using trl_fast::AttentionMask;
using trl_fast::KeyBlock;
using trl_fast::kKeyBlock;

// Rows of a strip: a tile of sums has so many.
constexpr int64_t kStrip = kTileRows < trl_fast::kMostStripRows ? 4 : trl_fast::kMostStripRows;
// Columns of packed keys and values, and of a tile.
constexpr int kPanelVectors = 2;
constexpr int64_t kPanelColumns = kPanelVectors * kWidth;
static_assert(kKeyBlock % kPanelColumns == 0 && kKeyBlock % kStrip == 0 && kStrip <= kTileRows);
static_assert(trl_fast::kMostPanelKeys % kPanelColumns == 0);
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

inline int64_t whole_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }

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

// Floats of scratch memory that a function which lays it out takes.
template <auto kLayOut>
int64_t scratch_of(const AttentionArgs& args) {
  Room room{nullptr};
  kLayOut(args, room);
  return room.used;
}

// A left factor of a product, the columns of a matrix as it lies: a number a row and step.
struct TransposedLeft {
  const float* data;
  int64_t stride;
  float at(int row, int64_t step) const { return data[step * stride + row]; }
  TransposedLeft from(int64_t step) const { return {data + step * stride, stride}; }
};

// Computes out (rows, columns) = left @ right or adds that to it, in whole vectors; right: panels of kPanelColumns
// columns that are panel_stride apart, from the first step on. Of kStrip rows as many are computed as a half, a
// quarter or all of them hold.
template <bool kAdds, int kRows = kStrip, typename Left>
inline void multiply_strip(int64_t rows, Left left, const float* right, int64_t panel_stride, int64_t steps,
                           int64_t columns, float* out, int64_t out_stride) {
  if constexpr (kRows > 2) {
    if (rows <= kRows / 2) {
      return multiply_strip<kAdds, kRows / 2>(rows, left, right, panel_stride, steps, columns, out, out_stride);
    }
  }
  for (; columns >= kPanelColumns; columns -= kPanelColumns, right += panel_stride, out += kPanelColumns) {
    multiply_tile<kRows, kPanelVectors, kAdds>(left, right, kPanelColumns, steps, out, out_stride);
  }
  if (columns > 0) multiply_tile<kRows, 1, kAdds>(left, right, kPanelColumns, steps, out, out_stride);
}

// Steps whose products are summed one after the other; their sums are added up before they are added to others.
constexpr int64_t kSumSteps = 32;

// Adds left @ right to out (rows, columns), with a right factor as it lies, its rows the steps.
template <int kRows = kStrip, typename Left>
inline void add_product(int64_t rows, Left left, const float* right, int64_t right_stride, int64_t steps,
                        int64_t columns, float* out, int64_t out_stride) {
  if constexpr (kRows > 2) {
    if (rows <= kRows / 2) {
      return add_product<kRows / 2>(rows, left, right, right_stride, steps, columns, out, out_stride);
    }
  }
  for (int64_t column = 0; column < columns; column += kPanelColumns) {
    float sums[kRows * kPanelColumns] = {};
    for (int64_t step = 0; step < steps; step += kSumSteps) {
      multiply_tile<kRows, kPanelVectors, true>(left.from(step), right + step * right_stride + column, right_stride,
                                                std::min(kSumSteps, steps - step), sums, kPanelColumns);
    }
    for (int64_t i = 0; i < kRows * kPanelColumns; i += kWidth) {
      float* const to = out + i / kPanelColumns * out_stride + column + i % kPanelColumns;
      store(to, load(to) + load(sums + i));
    }
  }
}

template <typename T>
inline T* row_of(const AttentionHeads& heads, int64_t head, int64_t token) {
  return static_cast<T*>(heads.data) + head * heads.head_stride + token * heads.token_stride;
}

// ---- which keys are seen

// Returns the keys of a block that a token sees, which belongs to the block's segment or continues it.
inline uint64_t keys_seen(const AttentionMask& mask, int64_t token, const KeyBlock& block) {
  const int64_t in_window = block.origin + mask.positions[token] - mask.window + 1;
  const int64_t begin = std::min<int64_t>(in_window, mask.first_in_runs[token]) - block.first;
  const int64_t from = std::max<int64_t>(begin, 0);
  const int64_t to = std::min<int64_t>(mask.ends_of_runs[token] - block.first, block.tokens);
  return from < to ? ~uint64_t{0} >> (kKeyBlock - (to - from)) << from : 0;
}

// Tokens of a tile, and their rows: row r is token r / group_size and head r % group_size, in whole strips.
struct Tile {
  int64_t first, tokens, rows, whole_rows;
};

inline Tile tile_of(const AttentionArgs& args, int64_t index) {
  const trl_fast::QueryTile& tile = args.plan.tiles[index];
  const int64_t rows = tile.tokens * args.group_size;
  return {tile.first, tile.tokens, rows, (rows + kStrip - 1) / kStrip * kStrip};
}

inline int64_t most_rows(const AttentionArgs& args) {
  return (args.tile_tokens * args.group_size + kStrip - 1) / kStrip * kStrip;
}

// What the rows of a strip, kStrip or at a tile's end fewer, see of a block.
struct Seen {
  uint64_t by_row[kStrip];
  uint64_t any = 0, all = ~uint64_t{0};
  int64_t rows = 0;

  // First and last + 1 of the keys that a row sees.
  int64_t begin() const { return __builtin_ctzll(any); }
  int64_t end() const { return kKeyBlock - __builtin_clzll(any); }
};

inline Seen* take_seen(Room& room, int64_t rows) {
  return reinterpret_cast<Seen*>(room.take(sizeof(Seen) / sizeof(float) * rows / kStrip));
}

// Writes what each strip of a tile sees of a block; returns whether that is anything.
inline bool look(const AttentionArgs& args, const Tile& tile, const KeyBlock& block, Seen* seen) {
  int64_t row = 0;
  uint64_t any = 0;
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const uint64_t keys = keys_seen(args.mask, tile.first + t, block);
    any |= keys;
    for (int64_t head = 0; head < args.group_size; ++head, ++row) {
      Seen& strip = seen[row / kStrip];
      if (row % kStrip == 0) strip = {};
      strip.by_row[strip.rows++] = keys;
      strip.any |= keys;
      strip.all &= keys;
    }
  }
  return any != 0;
}

// Columns of scores, whole vectors from a panel's begin on, in which a strip sees keys.
struct Columns {
  int64_t begin, end;
  explicit Columns(const Seen& seen) : begin(seen.begin() / kPanelColumns * kPanelColumns), end(padded(seen.end())) {}
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

// Widens a tile's rows of (heads, T, width), times a factor, to (whole_rows, stride), with zeros for what is missing.
template <typename T>
void gather(const AttentionArgs& args, const AttentionHeads& heads, int64_t group, const Tile& tile, int64_t width,
            float factor, int64_t stride, float* to) {
  for_rows(args, group, tile, [&](int64_t row, int64_t head, int64_t token) {
    const T* const from = row_of<const T>(heads, head, token);
    for (int64_t i = 0; i < width; i += kWidth) {
      store(to + row * stride + i, widen_first(from + i, width - i) * splat(factor));
    }
    std::fill(to + row * stride + padded(width), to + (row + 1) * stride, 0.0f);
  });
  std::fill(to + tile.rows * stride, to + tile.whole_rows * stride, 0.0f);
}

// Keys or values of a block as right factor: kAsColumns, its tokens are the columns, else the steps. Of the last panel
// of columns only vectors with tokens are written.
template <bool kAsColumns, typename T>
void pack_block(const AttentionHeads& heads, int64_t group, const KeyBlock& block, int64_t width, float* to) {
  const T* data = row_of<T>(heads, group, block.first);
  if constexpr (kAsColumns) {
    const Factor<T> columns = {data, heads.token_stride, 1, block.tokens, width};
    for (int64_t first = 0; first < block.tokens; first += kWidth) {
      const int64_t inside = first % kPanelColumns;
      pack_lanes(columns.part(first, 0, block.tokens - first, width), kPanelColumns,
                 to + (first - inside) * width + inside);
    }
  } else {
    pack_right<kPanelVectors>(Factor<T>{data, 1, heads.token_stride, width, block.tokens}, to);
  }
}

// ---- backward

// What backward has of the tile at work beside the numbers that are multiplied.
struct TileGradients {
  float* lse;     // (rows,), times a factor
  float* deltas;  // (rows,)
  float* query;   // (rows, stride) gradient by queries from a span's blocks, without the scale
  float** sums;   // (rows,) where it is summed over spans
  Seen* seen;     // of each strip
  int64_t stride;
};

inline TileGradients tile_gradients_room(Room& room, int64_t rows, int64_t stride) {
  TileGradients g;
  g.stride = stride;
  g.lse = room.take(rows);
  g.deltas = room.take(rows);
  g.query = room.take(rows * stride);
  g.sums = reinterpret_cast<float**>(room.take(2 * rows));
  g.seen = take_seen(room, rows);
  return g;
}

// Begins a tile of which `rows` rows, those that it lacks too, are computed.
inline void begin_tile(const AttentionArgs& args, int64_t group, const Tile& tile, int64_t rows, float lse_factor,
                       const TileGradients& g) {
  std::fill(g.query, g.query + rows * g.stride, 0.0f);
  for_rows(args, group, tile, [&](int64_t row, int64_t head, int64_t token) {
    g.lse[row] = args.lse[head * args.tokens + token] * lse_factor;
    g.deltas[row] = args.deltas[head * args.tokens + token];
    g.sums[row] = row_of<float>(args.grad_query, head, token);
  });
  std::fill(g.lse + tile.rows, g.lse + rows, 0.0f);
  std::fill(g.deltas + tile.rows, g.deltas + rows, 0.0f);
}

// Adds a span's share of the gradient of a tile's queries, times the scale, to the sums of all spans. place: where the
// plan lists the tile among the span's. In the order of the spans, whoever computes them: sums do not depend on the
// number of threads.
inline void add_in_turn(const AttentionArgs& args, int64_t group, int64_t place, const Tile& tile,
                        const TileGradients& g) {
  int32_t* const turn = args.turns + group * args.num_tiles + args.plan.span_tiles[place];
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != args.plan.span_turns[place]) sched_yield();
  const float* share = g.query;
  for (int64_t row = 0; row < tile.rows; ++row, share += g.stride) {
    for (int64_t i = 0; i < args.width; i += kWidth) {
      float* const to = g.sums[row] + i;
      const Vec sum = widen_first(to, args.width - i) + load(share + i) * splat(args.scale);
      narrow_part(sum, args.width - i, to);
    }
  }
  __atomic_store_n(turn, args.plan.span_turns[place] + 1, __ATOMIC_RELEASE);
}

// Goes over a span's tiles, and for each over the span's blocks of which it sees keys. In this order: begin(group,
// block, n) for each block of the span, and for each tile load(group, tile) and add(tile, block, n); end(group, block,
// n) for each block.
template <typename Begin, typename Load, typename Add, typename End>
inline void for_span(const AttentionArgs& args, int64_t task, const TileGradients& gradients, Begin begin, Load load,
                     Add add, End end) {
  const int64_t group = task % args.groups, number = task / args.groups;
  const trl_fast::KeySpan& span = args.plan.spans[number];
  const KeyBlock* const blocks = args.plan.blocks + span.first_block;
  for (int64_t n = 0; n < span.num_blocks; ++n) begin(group, blocks[n], n);
  for (int64_t place = args.plan.span_offsets[number]; place < args.plan.span_offsets[number + 1]; ++place) {
    const Tile tile = tile_of(args, args.plan.span_tiles[place]);
    load(group, tile);
    for (int64_t n = 0; n < span.num_blocks; ++n) {
      if (look(args, tile, blocks[n], gradients.seen)) add(tile, blocks[n], n);
    }
    add_in_turn(args, group, place, tile, gradients);
  }
  for (int64_t n = 0; n < span.num_blocks; ++n) end(group, blocks[n], n);
}

}  // namespace
