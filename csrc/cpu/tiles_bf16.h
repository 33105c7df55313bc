// Products of bfloat16 matrices, summed in float32, by tiles: AMX's instructions, or the same in plain C++, which lets
// any CPU test what is made with them.
//
// A tile of a factor has 16 lanes, rows of a left or columns of a right factor, and 32 steps of each, in 16 rows of 16
// words, two steps a word. A left one has a lane a row, a right one two steps a row: its transpose, word by word. A
// tile of sums has 16 x 16. A sum takes the even steps of two tiles in their order, the odd ones likewise, and both:
// its bits depend neither on its place in the tile nor on what else is there.
//
// Included by kernels that are compiled once per instruction set; hence the unnamed namespace.
#pragma once

#include "microkernel.h"

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kSteps = 32;
constexpr int64_t kTileNumbers = kLanes * kSteps;
// Lanes of two tiles, which are multiplied together: four tiles of sums do not wait for each other.
constexpr int64_t kBand = 2 * kLanes;

int64_t whole_bands(int64_t n) { return (n + kBand - 1) / kBand * kBand; }

// ---- instructions

#if defined(CPU_CAPABILITY_AMX)

struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileShapes kTileShapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Shapes this thread's tiles while it lives. Afterwards they have the shapes that they had: others use them, too. GCC
// knows of the first 8 bytes only that these instructions read and write: nothing else writes to `before_`.
class TileSession {
 public:
  TileSession() {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&kTileShapes);
  }
  ~TileSession() { _tile_loadconfig(&before_); }
  TileSession(const TileSession&) = delete;

 private:
  TileShapes before_;
};

// The instructions read memory of which the compiler does not know: what is written before is to be there.
inline void finish_writes() { __asm__ volatile("" ::: "memory"); }

// Rounds two vectors to numbers that stand one after the other; returns `sums` plus the rounded ones.
inline Vec narrow_and_add(BFloat16* to, Vec a, Vec b, Vec sums) {
  const __m512bh narrow = _mm512_maskz_cvtne2ps_pbh(~__mmask32{0}, bits_as<__m512>(b), bits_as<__m512>(a));
  std::memcpy(to, &narrow, sizeof(narrow));
  return bits_as<Vec>(_mm512_dpbf16_ps(bits_as<__m512>(sums), narrow, bits_as<__m512bh>(UVec{} + 0x3f803f80u)));
}

// Rounds two vectors to the low and the high halves of words.
inline void narrow_to_words(BFloat16* to, Vec low, Vec high) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh narrow = _mm512_maskz_cvtne2ps_pbh(~__mmask32{0}, bits_as<__m512>(high), bits_as<__m512>(low));
  const __m512i words =
      _mm512_maskz_permutexvar_epi16(~__mmask32{0}, bits_as<__m512i>(order), bits_as<__m512i>(narrow));
  std::memcpy(to, &words, sizeof(words));
}

#else

struct EmulatedTile {
  uint32_t words[kLanes][kLanes];
};
thread_local EmulatedTile emulated_tiles[8];

struct TileSession {
  TileSession() {}
  ~TileSession() {}
};

inline void finish_writes() {}

inline void _tile_zero(int tile) { emulated_tiles[tile] = {}; }

inline void _tile_loadd(int tile, const void* from, int64_t row_bytes) {
  for (int64_t row = 0; row < kLanes; ++row) {
    std::memcpy(emulated_tiles[tile].words[row], static_cast<const char*>(from) + row * row_bytes, 64);
  }
}

inline void _tile_stored(int tile, void* to, int64_t row_bytes) {
  for (int64_t row = 0; row < kLanes; ++row) {
    std::memcpy(static_cast<char*>(to) + row * row_bytes, emulated_tiles[tile].words[row], 64);
  }
}

inline void _tile_dpbf16ps(int sums, int left, int right) {
  const auto low = [](uint32_t word) { return bits_as<float>(word << 16); };
  const auto high = [](uint32_t word) { return bits_as<float>(word & 0xffff0000u); };
  for (int64_t row = 0; row < kLanes; ++row) {
    float even[kLanes] = {}, odd[kLanes] = {};
    for (int64_t step = 0; step < kLanes; ++step) {
      const uint32_t factor = emulated_tiles[left].words[row][step];
      const uint32_t* const factors = emulated_tiles[right].words[step];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        even[lane] += low(factor) * low(factors[lane]);
        odd[lane] += high(factor) * high(factors[lane]);
      }
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      uint32_t& sum = emulated_tiles[sums].words[row][lane];
      sum = bits_as<uint32_t>(bits_as<float>(sum) + (even[lane] + odd[lane]));
    }
  }
}

inline Vec narrow_and_add(BFloat16* to, Vec a, Vec b, Vec sums) {
  narrow(to, a);
  narrow(to + kWidth, b);
  return sums + (widen(to) + widen(to + kWidth));
}

inline void narrow_to_words(BFloat16* to, Vec low, Vec high) {
  const UVec words = (bfloat16_bits(low) >> 16) | (bfloat16_bits(high) & 0xffff0000u);
  std::memcpy(to, &words, sizeof(words));
}

#endif

// ---- products

// Tiles of a left factor: rows `row_stride` numbers apart, tiles of further steps and lanes as far as is said.
struct LeftTiles {
  const BFloat16* data;
  int64_t row_stride, step_stride, lane_stride;
};

// Tiles of a right factor, each in one piece.
struct RightTiles {
  const BFloat16* data;
  int64_t step_stride, lane_stride;
};

// Computes out = left @ right, or adds that to it, for one tile of rows or two, two of columns, and tiles of steps.
template <bool kAdds, bool kTwoRows>
inline void multiply_band(const LeftTiles& left, const RightTiles& right, int64_t steps, float* out,
                          int64_t out_stride) {
  const int64_t out_bytes = out_stride * sizeof(float), left_bytes = left.row_stride * sizeof(BFloat16);
  float* const below = out + kLanes * out_stride;
  if constexpr (kAdds) {
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + kLanes, out_bytes);
    if constexpr (kTwoRows) {
      _tile_loadd(2, below, out_bytes);
      _tile_loadd(3, below + kLanes, out_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwoRows) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    const BFloat16* const rows = left.data + step * left.step_stride;
    const BFloat16* const columns = right.data + step * right.step_stride;
    _tile_loadd(4, rows, left_bytes);
    _tile_loadd(6, columns, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, columns + right.lane_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoRows) {
      _tile_loadd(5, rows + left.lane_stride, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + kLanes, out_bytes);
  if constexpr (kTwoRows) {
    _tile_stored(2, below, out_bytes);
    _tile_stored(3, below + kLanes, out_bytes);
  }
}

// The same for up to kBand rows, of which whole tiles are computed, and any number of bands of columns.
template <bool kAdds>
void multiply_tiles(int64_t rows, const LeftTiles& left, RightTiles right, int64_t columns, int64_t steps, float* out,
                    int64_t out_stride) {
  finish_writes();
  for (int64_t column = 0; column < columns; column += kBand, right.data += 2 * right.lane_stride) {
    const auto multiply = rows > kLanes ? multiply_band<kAdds, true> : multiply_band<kAdds, false>;
    multiply(left, right, steps, out + column, out_stride);
  }
}

// ---- packing

// Exchanges words and rows of a tile: a left factor's becomes a right one's, and back.
inline void transpose_words(const void* from, void* to) {
  for (int64_t row = 0; row < kLanes; row += kWidth) {
    for (int64_t word = 0; word < kLanes; word += kWidth) {
      Vec rows[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) rows[i] = load(static_cast<const float*>(from) + (row + i) * kLanes + word);
      transpose(rows);
      for (int64_t i = 0; i < kWidth; ++i) store(static_cast<float*>(to) + (word + i) * kLanes + row, rows[i]);
    }
  }
}

// Copies up to kSteps numbers, with zeros behind them.
inline void copy_first(const BFloat16* from, int64_t n, BFloat16* to) {
  if (n >= kSteps) {
    std::memcpy(to, from, kSteps * sizeof(BFloat16));
  } else {
    std::memset(to, 0, kSteps * sizeof(BFloat16));
    if (n > 0) std::memcpy(to, from, n * sizeof(BFloat16));
  }
}

// Packs a tile of a matrix whose rows are lanes, with zeros for what it lacks: a left factor's, or a right one's.
template <bool kLeft>
inline void pack_lane_rows(const BFloat16* from, int64_t stride, int64_t lanes, int64_t steps, BFloat16* to) {
  alignas(64) BFloat16 rows[kTileNumbers];
  BFloat16* const left = kLeft ? to : rows;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    copy_first(from + lane * stride, lane < lanes ? steps : 0, left + lane * kSteps);
  }
  if constexpr (!kLeft) transpose_words(left, to);
}

// Packs a tile of a matrix whose rows are steps.
template <bool kLeft>
inline void pack_step_rows(const BFloat16* from, int64_t stride, int64_t lanes, int64_t steps, BFloat16* to) {
  alignas(64) BFloat16 pairs[kTileNumbers];
  BFloat16* const right = kLeft ? pairs : to;
  for (int64_t step = 0; step < kSteps; step += 2) {
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
      const auto numbers_of = [&](int64_t row) {
        return bits_as<UVec>(row < steps ? widen_first(from + row * stride + lane, lanes - lane) : Vec{});
      };
      const UVec words = numbers_of(step) >> 16 | numbers_of(step + 1);
      std::memcpy(right + step * kLanes + 2 * lane, &words, sizeof(words));
    }
  }
  if constexpr (kLeft) transpose_words(right, to);
}

}  // namespace
