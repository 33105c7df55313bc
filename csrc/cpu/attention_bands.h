// What attention by tiles of bfloat16 shares, forward and backward: bands of a tile's rows, what they see, and how
// they and blocks of keys are packed. In an unnamed namespace, once per translation unit.
#pragma once

#include "attention_tiles.h"
#include "tiles_bf16.h"

namespace {

constexpr float kLog2OfE = 1.44269504088896341f;
constexpr int64_t kStrips = kBand / kStrip;
static_assert(kBand % kStrip == 0 && kKeyBlock == 2 * kBand && kBand % (2 * kWidth) == 0);
static_assert(trl_fast::kMostPanelKeys % kBand == 0, "a block's packed keys are whole bands");

// 2^x to 3e-6, for what is rounded to 8 bits: a minimax polynomial of the part above the integer below, and a power of
// two. What is far below the normal range gives 0; NaN stays NaN.
inline Vec power_of_two(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const int floor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec f = bits_as<Vec>(_mm512_maskz_reduce_ps(0xffff, bits_as<__m512>(x), floor));
#else
  const Vec magic = splat(12582912.0f), within = x < splat(-160.0f) ? splat(-160.0f) : x;
  const Vec nearest = (within + magic) - magic;
  const Vec n = nearest > within ? nearest - splat(1.0f) : nearest;
  const Vec f = within - n;
#endif
  Vec p = splat(1.353416892e-02f) * f + splat(5.201146665e-02f);
  p = p * f + splat(2.414427468e-01f);
  p = p * f + splat(6.930038386e-01f);
  p = p * f + splat(1.000002593e+00f);
#if defined(CPU_CAPABILITY_AVX512)
  return bits_as<Vec>(_mm512_maskz_scalef_ps(0xffff, bits_as<__m512>(p), bits_as<__m512>(x)));
#else
  const Vec power = bits_as<Vec>((bits_as<UVec>(n + magic) << 23) + bits_as<UVec>(splat(1.0f)));
  return n < splat(-126.0f) ? Vec{} : p * power;
#endif
}

// ---- rows and blocks

int64_t band_rows(const AttentionArgs& args) { return whole_bands(most_rows(args)); }

BFloat16* take_narrow(Room& room, int64_t n) { return reinterpret_cast<BFloat16*>(room.take((n + 1) / 2)); }

// Copies a tile's rows of (heads, T, width) to whole bands of whole bands, with zeros for what is missing.
void gather_rows(const AttentionArgs& args, const AttentionHeads& heads, int64_t group, const Tile& tile,
                 int64_t width, BFloat16* to) {
  const int64_t stride = whole_bands(width);
  for_rows(args, group, tile, [&](int64_t row, int64_t head, int64_t token) {
    const BFloat16* const from = row_of<const BFloat16>(heads, head, token);
    for (int64_t i = 0; i < width; i += kSteps) copy_first(from + i, width - i, to + row * stride + i);
  });
  std::fill(to + tile.rows * stride, to + whole_bands(tile.rows) * stride, BFloat16{});
}

// The rows of a band from `row` on, as left factor.
LeftTiles band_of(const BFloat16* rows, int64_t row, int64_t stride) {
  return {rows + row * stride, stride, kSteps, kLanes * stride};
}

// Keys or values of a block as right factor, in whole bands: kAsColumns, its tokens are the columns, else the steps.
// Tiles stand in the order of the columns and, of each, of the steps, or of the steps and, of each, of the columns.
template <bool kAsColumns>
void pack_tiles(const AttentionHeads& heads, int64_t group, const KeyBlock& block, int64_t width, BFloat16* to) {
  constexpr int64_t token_step = kAsColumns ? kLanes : kSteps, channel_step = kAsColumns ? kSteps : kLanes;
  const BFloat16* const from = row_of<const BFloat16>(heads, group, block.first);
  for (int64_t token = 0; token < whole_bands(block.tokens); token += token_step) {
    for (int64_t channel = 0; channel < whole_bands(width); channel += channel_step, to += kTileNumbers) {
      const auto pack = kAsColumns ? pack_lane_rows<false> : pack_step_rows<false>;
      const int64_t tokens = block.tokens - token, channels = width - channel;
      pack(from + token * heads.token_stride + channel, heads.token_stride, kAsColumns ? tokens : channels,
           kAsColumns ? channels : tokens, to);
    }
  }
}

// Tokens from `token` on as columns; as steps.
RightTiles columns_from(int64_t token, const BFloat16* packed, int64_t width) {
  return {packed + token * whole_bands(width), kTileNumbers, whole_bands(width) / kSteps * kTileNumbers};
}
RightTiles steps_from(int64_t token, const BFloat16* packed, int64_t width) {
  return {packed + token * whole_bands(width), whole_bands(width) / kLanes * kTileNumbers, kTileNumbers};
}

// What a band sees of a block, and the columns, whole bands, in which that is.
struct BandSeen {
  uint64_t any = 0;
  explicit BandSeen(const Seen* strips) {
    for (int64_t n = 0; n < kStrips; ++n) any |= strips[n].any;
  }
  bool sees(int64_t key) const { return any >> key & 0xffffffffu; }
  int64_t begin() const { return sees(0) ? 0 : kBand; }
  int64_t end() const { return sees(kBand) ? kKeyBlock : kBand; }
};

bool sees_all(const Seen& seen) { return seen.all == ~uint64_t{0} && seen.rows == kStrip; }

// A tile may end within a band: its last strips see nothing.
void clear_last_strips(const Tile& tile, Seen* seen) {
  std::fill(seen + tile.whole_rows / kStrip, seen + whole_bands(tile.rows) / kStrip, Seen{{}, 0, 0, 0});
}

// What products of queries and keys are multiplied by to be exponents of two, and before that to be capped.
struct ScoreFactors {
  float exponent, inner;
  explicit ScoreFactors(const AttentionArgs& args)
      : exponent(args.softcap ? kLog2OfE : args.scale * kLog2OfE),
        inner(args.softcap ? args.scale / args.softcap : 0.0f) {}
};

}  // namespace
