// The product of two matrices, for one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// Both factors are packed, each number once if that can be: as many rows of `left` as the third-level cache holds,
// then a few columns of `right` for one block of steps, which meet all of those rows. Some of the rows and these
// columns are in the second-level cache at a time; a panel of each is in the first-level cache.
#include "product_kernels.h"

#include "microkernel.h"
#include "row_chunks.h"

namespace {

using trl_fast::Dtype;
using trl_fast::Matrix;
using trl_fast::MatrixProduct;
using trl_fast::ProductPart;
using trl_fast::SharedColumns;

// A panel of `right` of so many steps, and most of one of `left`, fit into 48 KiB of first-level cache with AVX-512,
// and into 32 KiB else.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kMostSteps = 320;
#else
constexpr int64_t kMostSteps = 256;
#endif
// Short sums are cut finer, as they would have no second block otherwise: their error is then that of ATen's.
constexpr int64_t kShort = 768, kMostStepsOfShort = 192;
// Rows of `left` and columns of `right` of a block of steps that share 1 MiB of second-level cache.
constexpr int64_t kPackedRows = 18 * kTileRows;
constexpr int64_t kPackedColumns = int64_t{128} / kTileColumns * kTileColumns;
// 8 MiB of packed rows of `left`.
constexpr int64_t kLeftFloats = int64_t{1} << 21;

// How a part is cut.
struct Cut {
  int64_t blocks;          // of steps
  int64_t blocks_at_once;  // of packed rows
  int64_t rows_at_once, row_chunks;
  int64_t left_floats, right_floats, sum_floats;

  // The first step of a block: they are as even as they can be.
  static int64_t step(const MatrixProduct& product, int64_t blocks, int64_t block) {
    return product.steps * block / blocks;
  }
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cut cut_of(const MatrixProduct& product, const ProductPart& part, bool shared) {
  Cut cut = {};
  cut.blocks =
      std::max<int64_t>(1, divided_up(product.steps, product.steps > kShort ? kMostSteps : kMostStepsOfShort));
  const int64_t block_steps = std::max<int64_t>(1, divided_up(product.steps, cut.blocks));
  // Sums that are rounded in the end are not written in between.
  const bool rounds = product.out_dtype != Dtype::kFloat32;
  const int64_t wanted = std::max<int64_t>(1, kLeftFloats / (block_steps * std::min<int64_t>(part.rows, 2048)));
  // Nor those to which another thread would add.
  cut.blocks_at_once = rounds || shared ? cut.blocks : std::min(cut.blocks, wanted);
  const int64_t most_rows = std::max<int64_t>(kTileRows, kLeftFloats / (cut.blocks_at_once * block_steps));
  // In equal parts of whole tiles: columns of `right` are packed once for each.
  const int64_t even_rows = divided_up(part.rows, divided_up(part.rows, most_rows));
  cut.rows_at_once = std::min(part.rows, divided_up(even_rows, kTileRows) * kTileRows);
  cut.row_chunks = divided_up(part.rows, cut.rows_at_once);
  cut.left_floats = padded(cut.rows_at_once * cut.blocks_at_once * block_steps) + kWidth;
  cut.right_floats = kPackedColumns * block_steps;
  cut.sum_floats = rounds ? cut.rows_at_once * kPackedColumns : 0;
  return cut;
}

int64_t scratch_floats(const MatrixProduct& product, const ProductPart& part, bool shared) {
  const Cut cut = cut_of(product, part, shared);
  return cut.left_floats + cut.right_floats + cut.sum_floats;
}

int64_t row_chunks(const MatrixProduct& product, const ProductPart& part) {
  return cut_of(product, part, true).row_chunks;
}

// Calls f with a null pointer to a matrix's type.
template <typename F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

void pack_rows(const Matrix& left, int64_t row, int64_t rows, int64_t step, int64_t steps, float* to) {
  with_type(left.dtype, [&](auto* null) {
    const auto* data = static_cast<decltype(null)>(const_cast<void*>(left.data));
    pack_left(Factor{data, left.row_stride, left.column_stride, 0, 0}.part(row, step, rows, steps), to);
  });
}

void pack_columns(const Matrix& right, int64_t column, int64_t columns, int64_t step, int64_t steps, float* to) {
  with_type(right.dtype, [&](auto* null) {
    const auto* data = static_cast<decltype(null)>(const_cast<void*>(right.data));
    pack_right<kTileVectors>(
        Factor{data, right.column_stride, right.row_stride, 0, 0}.part(column, step, columns, steps), to);
  });
}

// The first-level cache waits for no line that a tile's sums go to.
inline void prefetch_tile(const float* out, int64_t stride, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < kTileColumns; i += 16) __builtin_prefetch(out + row * stride + i, 1);
  }
}

template <bool kAdds>
void multiply_edge(int64_t rows, int64_t columns, const float* left, const float* right, int64_t steps, float* out,
                   int64_t stride) {
  float tile[kTileRows * kTileColumns];
  tile_product<false>(rows, divided_up(columns, kWidth), left, right, steps, tile, kTileColumns);
  for (int64_t row = 0; row < rows; ++row) {
    float* const to = out + row * stride;
    const float* const from = tile + row * kTileColumns;
    for (int64_t i = 0; i < columns; ++i) to[i] = kAdds ? to[i] + from[i] : from[i];
  }
}

// Multiplies packed rows with at most kPackedColumns packed columns.
template <bool kAdds>
void multiply_packed(int64_t rows, int64_t columns, const float* left, const float* right, int64_t steps, float* out,
                     int64_t stride) {
  for (int64_t first = 0; first < rows; first += kPackedRows) {
    const int64_t last = std::min(rows, first + kPackedRows);
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      const int64_t width = std::min<int64_t>(kTileColumns, columns - column);
      for (int64_t row = first; row < last; row += kTileRows) {
        const int64_t height = std::min<int64_t>(kTileRows, last - row);
        const float* const l = left + row * steps;
        const float* const r = right + column * steps;
        float* const to = out + row * stride + column;
        if (width % kWidth != 0) {
          multiply_edge<kAdds>(height, width, l, r, steps, to, stride);
        } else {
          prefetch_tile(to, stride, height);
          tile_product<kAdds>(height, width / kWidth, l, r, steps, to, stride);
        }
      }
    }
  }
}

// Rounds sums (rows, kPackedColumns), or what they and `out` add up to, into `out`.
template <typename T>
void round_sums(const float* sums, int64_t rows, int64_t columns, bool adds, T* out, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; i += kWidth) {
      T* const to = out + row * stride + i;
      const Vec sum = load(sums + row * kPackedColumns + i);
      narrow_part(adds ? widen_first(to, columns - i) + sum : sum, columns - i, to);
    }
  }
}

struct Scratch {
  float* left;
  float* right;
  float* sums;
};

// Multiplies rows that are packed for some blocks of steps with a few columns.
void multiply_columns(const MatrixProduct& product, const Cut& cut, const ProductPart& part, int64_t first_block,
                      int64_t last_block, const Scratch& scratch) {
  const bool rounds = product.out_dtype != Dtype::kFloat32;
  const int64_t stride = rounds ? kPackedColumns : product.out_stride;
  const int64_t at = part.row * product.out_stride + part.column;
  float* const out = rounds ? scratch.sums : static_cast<float*>(product.out) + at;
  const int64_t first_step = Cut::step(product, cut.blocks, first_block);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t step = Cut::step(product, cut.blocks, block);
    const int64_t steps = Cut::step(product, cut.blocks, block + 1) - step;
    pack_columns(product.right, part.column, part.columns, step, steps, scratch.right);
    const float* const left = scratch.left + part.rows * (step - first_step);
    const bool adds = block > 0 || (product.adds && !rounds);
    (adds ? multiply_packed<true> : multiply_packed<false>)(part.rows, part.columns, left, scratch.right, steps, out,
                                                            stride);
  }
  if (!rounds) return;
  with_type(product.out_dtype, [&](auto* null) {
    auto* to = static_cast<decltype(null)>(product.out) + at;
    round_sums(scratch.sums, part.rows, part.columns, product.adds, to, product.out_stride);
  });
}

// Calls f(first, width) for columns that no other thread computes, a few at a time: fewer when few are left, so that
// threads end together.
template <typename F>
void for_columns(int64_t columns, int64_t chunk, const SharedColumns* shared, F f) {
  std::atomic<int64_t> own{0};
  std::atomic<int64_t>& taken = shared ? shared->taken[chunk] : own;
  int64_t first = taken.load(std::memory_order_relaxed);
  while (first < columns) {
    const int64_t left = columns - first;
    int64_t width = kPackedColumns;
    if (shared) width = std::clamp(divided_up(left, 2 * shared->threads), int64_t{2} * kTileColumns, kPackedColumns);
    width = std::min(left, width / kTileColumns * kTileColumns);
    if (taken.compare_exchange_weak(first, first + width, std::memory_order_relaxed)) {
      f(first, width);
      first = taken.load(std::memory_order_relaxed);
    }
  }
}

void multiply(const MatrixProduct& product, const ProductPart& part, const SharedColumns* shared, float* memory) {
  const Cut cut = cut_of(product, part, shared != nullptr);
  const Scratch scratch = {memory + cut.right_floats + cut.sum_floats, memory, memory + cut.right_floats};
  for (int64_t block = 0; block < cut.blocks; block += cut.blocks_at_once) {
    const int64_t last = std::min(cut.blocks, block + cut.blocks_at_once);
    const int64_t first_step = Cut::step(product, cut.blocks, block);
    for (int64_t chunk = 0; chunk < cut.row_chunks; ++chunk) {
      const int64_t r = chunk * cut.rows_at_once, rows = std::min(cut.rows_at_once, part.rows - r);
      for (int64_t b = block; b < last; ++b) {
        const int64_t step = Cut::step(product, cut.blocks, b), stop = Cut::step(product, cut.blocks, b + 1);
        pack_rows(product.left, part.row + r, rows, step, stop - step, scratch.left + rows * (step - first_step));
      }
      for_columns(part.columns, chunk, shared, [&](int64_t column, int64_t columns) {
        multiply_columns(product, cut, {part.row + r, part.column + column, rows, columns}, block, last, scratch);
      });
    }
  }
}

void add(const Matrix& part, int64_t rows, int64_t columns, float* total, int64_t total_stride) {
  with_type(part.dtype, [&](auto* null) {
    const auto* const data = static_cast<decltype(null)>(const_cast<void*>(part.data));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; i += kWidth) {
        float* const to = total + row * total_stride + i;
        narrow_part(widen_first(to, columns - i) + widen_first(data + row * part.row_stride + i, columns - i),
                    columns - i, to);
      }
    }
  });
}

}  // namespace

namespace trl_fast {

extern const ProductKernels TRL_FAST_JOIN(kProductKernels, CPU_CAPABILITY);
const ProductKernels TRL_FAST_JOIN(kProductKernels, CPU_CAPABILITY) = {kTileRows, scratch_floats, row_chunks, multiply,
                                                                       add};

}  // namespace trl_fast
