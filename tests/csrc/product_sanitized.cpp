// Multiplies matrices under a sanitizer, in heap buffers of exactly the size that a product may touch: alone, and
// shared by threads that take columns in turn. Both must give the same bits, and each number must be near its sum.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <latch>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/product_kernels.cpp"

namespace {

const trl_fast::ProductKernels& kernels = trl_fast::TRL_FAST_JOIN(kProductKernels, CPU_CAPABILITY);
constexpr int64_t kThreads = 3;

std::unique_ptr<float[]> numbers(int64_t size, float seed) {
  std::unique_ptr<float[]> data(new float[size]);
  for (int64_t i = 0; i < size; ++i) data[i] = std::sin(seed * static_cast<float>(i + 1));
  return data;
}

// Scratch memory is aligned to a cache line.
struct Memory {
  float* data;
  explicit Memory(int64_t floats) : data(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {}
  ~Memory() { std::free(data); }
};

void multiply_shared(const MatrixProduct& product, const ProductPart& part) {
  const std::unique_ptr<std::atomic<int64_t>[]> taken(new std::atomic<int64_t>[kernels.row_chunks(product, part)]());
  const SharedColumns shared = {taken.get(), kThreads};
  std::vector<std::thread> threads;
  std::latch all(kThreads);
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&] {
      const Memory memory(kernels.scratch_floats(product, part, true));
      all.arrive_and_wait();
      kernels.multiply(product, part, &shared, memory.data);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

bool agree(int64_t rows, int64_t columns, int64_t steps, bool left_lies, bool right_lies) {
  const auto left = numbers(rows * steps, 0.7f), right = numbers(steps * columns, 0.3f);
  const auto alone = numbers(rows * columns, 0.5f), together = numbers(rows * columns, 0.5f);
  const Matrix l = {left.get(), Dtype::kFloat32, left_lies ? steps : 1, left_lies ? 1 : rows};
  const Matrix r = {right.get(), Dtype::kFloat32, right_lies ? columns : 1, right_lies ? 1 : steps};
  MatrixProduct product = {l, r, rows, columns, steps, alone.get(), Dtype::kFloat32, columns, false};
  const ProductPart part = {0, 0, rows, columns};
  const Memory memory(kernels.scratch_floats(product, part, false));
  kernels.multiply(product, part, nullptr, memory.data);
  product.out = together.get();
  multiply_shared(product, part);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0;
      for (int64_t k = 0; k < steps; ++k) {
        sum += static_cast<double>(left[row * l.row_stride + k * l.column_stride]) *
               right[k * r.row_stride + column * r.column_stride];
      }
      const int64_t at = row * columns + column;
      if (alone[at] != together[at] || std::fabs(alone[at] - sum) > 1e-4) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 25, 8}, {4, 24, 7}, {21, 130, 300}, {37, 63, 9}, {600, 30, 3600}};
  for (const auto& [rows, columns, steps] : shapes) {
    for (int layout = 0; layout < 4; ++layout) {
      if (!agree(rows, columns, steps, layout & 1, layout & 2)) {
        std::printf("wrong: %ld rows, %ld columns, %ld steps, layout %d\n", rows, columns, steps, layout);
        return 1;
      }
    }
  }
  std::puts("done");
}
