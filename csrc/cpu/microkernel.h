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

// Sums, a step of `right` and one number of `left` take all but one of AVX-512's 32 registers, and all of AVX2's 16.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 14, kTileVectors = 2;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 4, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
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
// right: steps that are right_stride apart.
template <int kRows, int kVectors, bool kAdds, typename Left>
inline void multiply_tile(Left left, const float* right, int64_t right_stride, int64_t steps, float* out,
                          int64_t out_stride) {
  Vec sums[kRows][kVectors] = {};
  // Counting each step would be two of AVX2's 21 instructions, of which a core that runs two threads may do three a
  // cycle for each, where 12 multiply-adds take six cycles.
#pragma GCC unroll 4
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

using TileProduct = void (*)(const float* left, const float* right, int64_t steps, float* out, int64_t out_stride);

template <int kRows, int kVectors, bool kAdds>
void packed_product(const float* left, const float* right, int64_t steps, float* out, int64_t out_stride) {
  multiply_tile<kRows, kVectors, kAdds>(PackedLeft<kRows>{left}, right, kTileColumns, steps, out, out_stride);
}

template <bool kAdds, int... kPlaces>
constexpr std::array<TileProduct, sizeof...(kPlaces)> products_of(std::integer_sequence<int, kPlaces...>) {
  return {packed_product<kPlaces / kTileVectors + 1, kPlaces % kTileVectors + 1, kAdds>...};
}

// Computes out = left @ right for 1 to kTileRows rows and 1 to kTileVectors vectors of columns, or adds that to `out`.
//
// left: a panel that pack_left wrote. right: (steps, kTileColumns), a panel that pack_right<kTileVectors> wrote.
template <bool kAdds>
inline void tile_product(int64_t rows, int64_t vectors, const float* left, const float* right, int64_t steps,
                         float* out, int64_t out_stride) {
  static constexpr auto products = products_of<kAdds>(std::make_integer_sequence<int, kTileRows * kTileVectors>());
  products[(rows - 1) * kTileVectors + vectors - 1](left, right, steps, out, out_stride);
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

// Turns four rows of eight steps into the steps, two a vector.
inline void transpose_four(Vec (&rows)[4]) {
  constexpr auto kLanes = std::make_integer_sequence<int, kWidth>();
  exchange<2>(rows[0], rows[2], kLanes);
  exchange<2>(rows[1], rows[3], kLanes);
  exchange<1>(rows[0], rows[1], kLanes);
  exchange<1>(rows[2], rows[3], kLanes);
  // Each has a step and the one that is four later.
  exchange<4>(rows[0], rows[1], kLanes);
  exchange<4>(rows[2], rows[3], kLanes);
  std::swap(rows[1], rows[2]);
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

// Packs rows that lie, four a panel, by vectors of eight steps; pack_lanes would read each row twice.
template <typename T>
void pack_four_rows(Factor<T> from, float* to) {
  for (int64_t row = 0; row < from.lanes; row += 4, to += 4 * from.steps) {
    const T* const panel = from.data + row * from.lane_stride;
    for (int64_t step = 0; step < from.steps; step += kWidth) {
      const int64_t steps = std::min<int64_t>(kWidth, from.steps - step);
      Vec rows[4];
      for (int lane = 0; lane < 4; ++lane) {
        __builtin_prefetch(panel + (lane + 4) * from.lane_stride + step);
        rows[lane] = widen_first(panel + lane * from.lane_stride + step, steps);
      }
      transpose_four(rows);
      for (int64_t k = 0; k < steps; k += 2) store(to + (step + k) * 4, rows[k / 2]);
    }
  }
}

// Packs steps that lie, four of their numbers a panel: those of a cache line at a time.
template <typename T>
void pack_four_columns(Factor<T> from, float* to) {
  constexpr int kLine = 16;
  for (int64_t row = 0; row < from.lanes; row += kLine, to += kLine * from.steps) {
    for (int64_t step = 0; step < from.steps; ++step) {
      const T* const line = from.data + step * from.step_stride + row;
      __builtin_prefetch(line + 4 * kAhead * from.step_stride);
      for (int lane = 0; lane < kLine; lane += kWidth) {
        const Vec numbers = widen(line + lane);
        float* const panel = to + lane * from.steps + step * 4;
        std::memcpy(panel, &numbers, 4 * sizeof(float));
        std::memcpy(panel + 4 * from.steps, reinterpret_cast<const float*>(&numbers) + 4, 4 * sizeof(float));
      }
    }
  }
}

// Packs a left factor of any number of rows: panels of kTileRows rows, the last of what is left, one after the other,
// each (steps, rows). The panel of row r begins at to + r * steps. Writes kWidth floats beyond the last number.
template <typename T>
void pack_left(Factor<T> from, float* to) {
  static_assert(kTileRows <= kWidth, "a vector a step is written");
  int64_t row = 0;
  if constexpr (kTileRows == 4 && kWidth == 8) {
    const bool rows_lie = from.step_stride == 1, steps_lie = from.lane_stride == 1;
    const int64_t several = rows_lie ? 4 : 16;
    if (rows_lie || steps_lie) row = from.lanes / several * several;
    const Factor<T> whole = from.part(0, 0, row, from.steps);
    rows_lie ? pack_four_rows(whole, to) : pack_four_columns(whole, to);
  }
  for (; row < from.lanes; row += kTileRows) {
    // A vector's lanes beyond the panel's rows are overwritten by what comes after it.
    const int64_t left = from.lanes - row;
    pack_lanes(from.part(row, 0, left, from.steps), std::min<int64_t>(kTileRows, left), to + row * from.steps);
  }
}

// Packs a right factor of any number of columns: panels of kVectors vectors of columns, a step after the other, with
// zeros for the columns that the last one lacks. The panel of column c begins at to + c * steps.
template <int kVectors, typename T>
void pack_right(Factor<T> from, float* to) {
  constexpr int64_t kColumns = kVectors * kWidth;
  const int64_t whole = from.lane_stride == 1 ? from.lanes / kColumns * kColumns : 0;
  // Rows that lie are read as such, a page at a time.
  for (int64_t step = 0; step < from.steps && whole > 0; ++step) {
    const T* const row = from.data + step * from.step_stride;
    float* const panel = to + step * kColumns;
    for (int64_t column = 0; column < whole; column += kWidth) {
      const int64_t inside = column % kColumns;
      __builtin_prefetch(row + kAhead * from.step_stride + column);
      store(panel + (column - inside) * from.steps + inside, widen(row + column));
    }
  }
  for (int64_t column = whole; column < from.lanes; column += kColumns) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = column + v * kWidth;
      const int64_t columns = std::clamp<int64_t>(from.lanes - first, 0, kWidth);
      pack_lanes(from.part(first, 0, columns, from.steps), kColumns, to + column * from.steps + v * kWidth);
    }
  }
}

}  // namespace
