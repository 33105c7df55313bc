// Registers torch.ops.trl_fast.product and add_widened; trl_fast/ops/matmul.py calls them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/product_kernels.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

// Multiplications that are worth a thread of their own: some microseconds.
constexpr int64_t kTaskProducts = int64_t{1} << 19;
// Additions that are: as many microseconds.
constexpr int64_t kTaskNumbers = int64_t{1} << 15;

// A thread's memory for packed factors, kept from call to call: fresh pages would take as long as small products do.
class ThreadScratch {
 public:
  float* of(int64_t floats) {
    const std::size_t bytes = (floats * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(std::aligned_alloc(kHugePage, bytes));
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    return static_cast<float*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

float* thread_scratch(int64_t floats) {
  static thread_local ThreadScratch scratch;
  return scratch.of(floats);
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How threads share a product: bands of rows, each computed by a team of threads; or, where a team is one thread, more
// bands than threads, which they take in turn.
struct Sharing {
  int64_t bands, band_tiles, team;

  ProductPart part(int64_t band, const MatrixProduct& product, const ProductKernels& kernels) const {
    const int64_t height = band_tiles * kernels.tile_rows, row = band * height;
    return {row, 0, std::min(height, product.rows - row), product.columns};
  }
};

// Bands for each thread that takes whole ones.
constexpr int64_t kBandsOfThread = 4;

// The sharing in which a thread packs least: all rows of its bands, and of the columns what it takes, or all of them
// for each band.
Sharing sharing_of(const MatrixProduct& product, const ProductKernels& kernels, int64_t threads) {
  const int64_t tiles = divided_up(product.rows, kernels.tile_rows);
  if (threads == 1) return {1, tiles, 1};
  const auto of_bands = [&](int64_t bands, int64_t team) {
    const int64_t band_tiles = divided_up(tiles, bands);
    return Sharing{divided_up(tiles, band_tiles), band_tiles, team};
  };
  Sharing best = of_bands(kBandsOfThread * threads, 1);
  int64_t least = product.rows / threads + kBandsOfThread * product.columns;
  for (int64_t bands = 1; bands <= std::min(threads / 2, tiles); ++bands) {
    const int64_t team = threads / bands, packed = product.rows / bands + product.columns / team;
    if (bands * team == threads && packed < least) {
      best = of_bands(bands, team);
      least = packed;
    }
  }
  return best;
}

// Multiplies with several threads.
void multiply(const MatrixProduct& product, const ProductKernels& kernels, const Sharing& sharing, int64_t threads) {
  const bool teams = sharing.team > 1;
  // Counts taken columns of each band's chunks of rows, or taken bands.
  const int64_t chunks = teams ? kernels.row_chunks(product, sharing.part(0, product, kernels)) : 1;
  const auto taken = std::make_unique<std::atomic<int64_t>[]>(teams ? sharing.bands * chunks : 1);
  const auto run = [&](int64_t band, const SharedColumns* shared) {
    const ProductPart part = sharing.part(band, product, kernels);
    kernels.multiply(product, part, shared, thread_scratch(kernels.scratch_floats(product, part, shared)));
  };
  at::parallel_for(0, teams ? sharing.bands * sharing.team : threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      if (teams) {
        const int64_t band = thread / sharing.team;
        const SharedColumns shared = {taken.get() + band * chunks, sharing.team};
        run(band, &shared);
      } else {
        for (int64_t band; (band = taken[0].fetch_add(1, std::memory_order_relaxed)) < sharing.bands;) {
          run(band, nullptr);
        }
      }
    }
  });
}

Matrix matrix_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.device().is_cpu(), name, ": expected a CPU tensor of two dimensions, ",
                    "got ", tensor.sizes(), " on ", tensor.device());
  return {tensor.const_data_ptr(), dtype_of(tensor, name), tensor.stride(0), tensor.stride(1)};
}

void product(const at::Tensor& left, const at::Tensor& right, at::Tensor out, bool accumulate) {
  Matrix l = matrix_of(left, "left"), r = matrix_of(right, "right");
  const int64_t steps = left.size(1);
  TORCH_CHECK_VALUE(right.size(0) == steps, "right: expected ", steps, " rows, as left has columns, got ",
                    right.sizes());
  TORCH_CHECK_VALUE(
      out.dim() == 2 && out.size(0) == left.size(0) && out.size(1) == right.size(1) && out.device().is_cpu(),
      "out: expected a CPU tensor of shape (", left.size(0), ", ", right.size(1), "), got ", out.sizes());
  const Dtype dtype = dtype_of(out, "out");
  int64_t rows = out.size(0), columns = out.size(1), stride = out.stride(0);
  const bool rows_lie = columns <= 1 || out.stride(1) == 1;
  TORCH_CHECK_VALUE(rows_lie || rows <= 1 || out.stride(0) == 1, "out: expected contiguous rows or columns, got ",
                    "strides ", out.strides());
  if (!rows_lie) {
    // outᵀ = rightᵀ leftᵀ, with the same bits.
    std::swap(l, r);
    std::swap(l.row_stride, l.column_stride);
    std::swap(r.row_stride, r.column_stride);
    std::swap(rows, columns);
    stride = out.stride(1);
  }
  if (rows == 0 || columns == 0) return;
  const MatrixProduct args = {l, r, rows, columns, steps, out.mutable_data_ptr(), dtype, stride, accumulate};
  const ProductKernels& kernels = product_kernels();
  const int64_t worth = static_cast<int64_t>(static_cast<double>(rows) * columns * steps / kTaskProducts);
  const int64_t threads = std::clamp<int64_t>(worth, 1, at::get_num_threads());
  multiply(args, kernels, sharing_of(args, kernels, threads), threads);
}

void add_widened(const at::Tensor& part, at::Tensor total) {
  Matrix from = matrix_of(part, "part");
  TORCH_CHECK_VALUE(total.dim() == 2 && total.device().is_cpu() && dtype_of(total, "total") == Dtype::kFloat32 &&
                        total.sizes() == part.sizes(),
                    "total: expected float32 of the part's shape, ", part.sizes(), ", on the CPU, got ",
                    total.sizes());
  const int64_t rows = total.size(0), columns = total.size(1), stride = total.stride(0);
  TORCH_CHECK_VALUE(columns <= 1 || (total.stride(1) == 1 && part.stride(1) == 1),
                    "part, total: expected contiguous rows, got strides ", part.strides(), " and ", total.strides());
  float* const to = total.mutable_data_ptr<float>();
  const int64_t row_bytes = from.row_stride * part.element_size();
  at::parallel_for(0, rows, std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, columns)),
                   [&](int64_t begin, int64_t end) {
                     Matrix first = from;
                     first.data = static_cast<const char*>(from.data) + begin * row_bytes;
                     product_kernels().add(first, end - begin, columns, to + begin * stride, stride);
                   });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def("product(Tensor left, Tensor right, Tensor(a!) out, bool accumulate) -> ()");
  m.def("add_widened(Tensor part, Tensor(a!) total) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("product", &product);
  m.impl("add_widened", &add_widened);
}

}  // namespace trl_fast
