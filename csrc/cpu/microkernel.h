// A product of matrices within registers: packing of its factors, and a tile of sums of products.
//
// out (rows, columns) = left (rows, steps) @ right (steps, columns), in float32. A tile has up to kTileRows rows and
// kTileColumns columns, whose sums stay in registers while a step reads kTileColumns numbers of `right` and one of
// `left` for each row. Each sum is taken step after step, with one rounding a step where the CPU has fused
// multiply-adds: its bits depend neither on the tile that it is in nor on its place there.
//
// Included by kernels that are compiled once per instruction set; hence the unnamed namespace.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace {

// Sums, a row of `right` and one number of `left` take all but one of AVX-512's 32 and AVX2's 16 registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 14;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
static_assert(kTileRows <= kWidth, "pack_left writes a vector a step");
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kWidth;

// ---- the tile

// A left factor whose steps lie one after the other, each with `kRows` numbers: what pack_left writes.
template <int kRows>
struct PackedLeft {
  const float* data;
  float at(int row, int64_t step) const { return data[step * kRows + row]; }
};

// A left factor as it lies, its steps one after the other in each row.
struct PlainLeft {
  const float* data;
  int64_t row_stride;
  float at(int row, int64_t step) const { return data[row * row_stride + step]; }
};

// Computes out = left @ right for kRows rows and kVectors vectors of columns, or adds that to `out`.
// right: (steps, kTileColumns), as pack_right writes it, or with steps that are right_stride apart.
template <int kRows, bool kAdds, int kVectors = kTileVectors, typename Left>
inline void multiply_tile(Left left, const float* right, int64_t steps, float* out, int64_t out_stride,
                          int64_t right_stride = kTileColumns) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    Vec columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(right + step * right_stride + v * kWidth);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec factor = splat(left.at(row, step));
      for (int v = 0; v < kVectors; ++v) sums[row][v] += factor * columns[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      float* const to = out + row * out_stride + v * kWidth;
      store(to, kAdds ? load(to) + sums[row][v] : sums[row][v]);
    }
  }
}

using TileProduct = void (*)(const float* left, int64_t left_stride, const float* right, int64_t steps, float* out,
                             int64_t out_stride);

template <int kRows, bool kAdds>
void packed_product(const float* left, int64_t, const float* right, int64_t steps, float* out, int64_t out_stride) {
  multiply_tile<kRows, kAdds>(PackedLeft<kRows>{left}, right, steps, out, out_stride);
}

template <int kRows, bool kAdds>
void plain_product(const float* left, int64_t left_stride, const float* right, int64_t steps, float* out,
                   int64_t out_stride) {
  multiply_tile<kRows, kAdds>(PlainLeft{left, left_stride}, right, steps, out, out_stride);
}

template <bool kAdds, bool kPacked, int... kRows>
constexpr std::array<TileProduct, sizeof...(kRows)> products_of(std::integer_sequence<int, kRows...>) {
  return {(kPacked ? packed_product<kRows + 1, kAdds> : plain_product<kRows + 1, kAdds>)...};
}

// Computes out = left @ right for 1 to kTileRows rows and kTileColumns columns, or adds that to `out`.
//
// left: kPacked, a panel that pack_left wrote, left_stride without meaning; else (rows, steps) with rows left_stride
// apart. right: (steps, kTileColumns), a panel that pack_right wrote.
template <bool kAdds, bool kPacked = true>
inline void tile_product(int64_t rows, const float* left, int64_t left_stride, const float* right, int64_t steps,
                         float* out, int64_t out_stride) {
  static constexpr auto products = products_of<kAdds, kPacked>(std::make_integer_sequence<int, kTileRows>());
  products[rows - 1](left, left_stride, right, steps, out, out_stride);
}

// ---- packing

// Exchanges the odd blocks of kBlock numbers of a with the even ones of b.
template <int kBlock, int... kLanes>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLanes...>) {
  const Vec first = __builtin_shufflevector(a, b, (kLanes & kBlock ? kWidth + kLanes - kBlock : kLanes)...);
  b = __builtin_shufflevector(a, b, (kLanes & kBlock ? kWidth + kLanes : kLanes + kBlock)...);
  a = first;
}

template <int kBlock>
inline void exchange_blocks(Vec (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & kBlock)) exchange<kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kWidth>());
  }
}

// Transposes a square: a half of its numbers changes its place a step, from the largest blocks to the smallest.
inline void transpose(Vec (&rows)[kWidth]) {
  if constexpr (kWidth == 16) exchange_blocks<8>(rows);
  if constexpr (kWidth >= 8) exchange_blocks<4>(rows);
  exchange_blocks<2>(rows);
  exchange_blocks<1>(rows);
}

// The first n numbers from `from` on, 0 after them; all of a vector if n is large enough.
template <typename T>
inline Vec widen_first(const T* from, int64_t n) {
  if (n >= kWidth) return widen(from);
  T part[kWidth] = {};
  if (n > 0) std::memcpy(part, from, n * sizeof(T));
  return widen(part);
}

inline float widen_one(float x) { return x; }
inline float widen_one(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen_one(Float16 x) {
  Float16 part[kWidth] = {x};
  return widen(part)[0];
}

// A factor of a product. `lanes` are a left factor's rows or a right one's columns; strides are in elements, and one
// of them should be 1: else every number is read for itself.
template <typename T>
struct Factor {
  const T* data;
  int64_t lane_stride;
  int64_t step_stride;
  int64_t lanes;
  int64_t steps;

  Factor part(int64_t lane, int64_t step, int64_t num_lanes, int64_t num_steps) const {
    return {data + lane * lane_stride + step * step_stride, lane_stride, step_stride, num_lanes, num_steps};
  }
};

// Rows that lie are fetched so many before they are read: their order in memory is none that a CPU foresees.
constexpr int64_t kAhead = 4;

// Writes the first kWidth lanes of all steps, zeros for lanes that the factor lacks, as vectors that are `to_stride`
// apart. They are written one after the other: a later one may overlap an earlier one.
template <typename T>
void pack_lanes(Factor<T> from, int64_t to_stride, float* to) {
  if (from.lane_stride == 1) {
    for (int64_t step = 0; step < from.steps; ++step) {
      __builtin_prefetch(from.data + (step + 4 * kAhead) * from.step_stride);
      store(to + step * to_stride, widen_first(from.data + step * from.step_stride, from.lanes));
    }
  } else if (from.step_stride == 1) {
    for (int64_t step = 0; step < from.steps; step += kWidth) {
      const int64_t steps = std::min<int64_t>(kWidth, from.steps - step);
      Vec rows[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) {
        __builtin_prefetch(from.data + (lane + kWidth) * from.lane_stride + step);
        rows[lane] = lane < from.lanes ? widen_first(from.data + lane * from.lane_stride + step, steps) : Vec{};
      }
      transpose(rows);
      for (int64_t k = 0; k < steps; ++k) store(to + (step + k) * to_stride, rows[k]);
    }
  } else {
    for (int64_t step = 0; step < from.steps; ++step) {
      Vec numbers = {};
      for (int64_t lane = 0; lane < std::min<int64_t>(from.lanes, kWidth); ++lane) {
        numbers[lane] = widen_one(from.data[lane * from.lane_stride + step * from.step_stride]);
      }
      store(to + step * to_stride, numbers);
    }
  }
}

// Packs a left factor of any number of rows: panels of kTileRows rows, the last of what is left, one after the other,
// each (steps, rows). The panel of row r begins at to + r * steps. Writes kWidth floats beyond the last number.
template <typename T>
void pack_left(Factor<T> from, float* to) {
  for (int64_t row = 0; row < from.lanes; row += kTileRows) {
    // A vector's lanes beyond the panel's rows are overwritten by what comes after it.
    const int64_t left = from.lanes - row;
    pack_lanes(from.part(row, 0, left, from.steps), std::min<int64_t>(kTileRows, left), to + row * from.steps);
  }
}

// Packs a right factor of any number of columns: panels of kTileColumns columns, (steps, kTileColumns) each, with
// zeros for the columns that the last one lacks. The panel of column c begins at to + c * steps.
template <typename T>
void pack_right(Factor<T> from, float* to) {
  const int64_t whole = from.lane_stride == 1 ? from.lanes / kTileColumns * kTileColumns : 0;
  // Rows that lie are read as such, a page at a time.
  for (int64_t step = 0; step < from.steps && whole > 0; ++step) {
    const T* const row = from.data + step * from.step_stride;
    float* const panel = to + step * kTileColumns;
    for (int64_t column = 0; column < whole; column += kWidth) {
      const int64_t inside = column % kTileColumns;
      __builtin_prefetch(row + kAhead * from.step_stride + column);
      store(panel + (column - inside) * from.steps + inside, widen(row + column));
    }
  }
  for (int64_t column = whole; column < from.lanes; column += kTileColumns) {
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t first = column + v * kWidth;
      const int64_t columns = std::clamp<int64_t>(from.lanes - first, 0, kWidth);
      pack_lanes(from.part(first, 0, columns, from.steps), kTileColumns, to + column * from.steps + v * kWidth);
    }
  }
}

}  // namespace
