// Runs the CUDA kernel of divergences under a sanitizer, or plants a defect that it has to find; argv[1] names it.
#include <cstdio>
#include <string>

#include "support/simt.h"

#ifdef TRL_FAST_PLANT_MISSING_BARRIER
#define __syncthreads()
#endif
#include "cuda/divergence_kernels.cuh"

using namespace trl_fast;

namespace {

constexpr int64_t kRows = 2;

std::vector<float> numbers(int64_t count, int64_t step) {
  std::vector<float> found;
  for (int64_t i = 0; i < count; ++i) found.push_back(0.01f * (i * step % 1009) - 5.0f);
  found.shrink_to_fit();
  return found;
}

// Heap buffers of exactly the size that the kernel may touch. The gradient takes the first half of the student's rows.
void run(unsigned seed, int64_t columns, int64_t excess_columns, int64_t missing_bias) {
  std::vector<float> student = numbers(kRows * columns, 37), teacher = numbers(kRows * columns, 101);
  std::vector<float> bias = numbers(columns - missing_bias, 5), weights(kRows, 0.5f);
  std::vector<float> results(kNumDivergenceResults * kRows);
  DivergenceArgs args = {};
  args.student = {student.data(), Dtype::kFloat32, columns, {bias.data(), 0.5f, 30.0f, 1.25f}};
  args.teacher = {teacher.data(), Dtype::kFloat32, columns, {nullptr, 1.0f, 0.0f, 1.25f}};
  args.columns = columns + excess_columns;
  args.numbers = {0.25f, 0.75f, 0.25f, 0.75f, 0.0f, false};
  args.weights = weights.data();
  args.results = results.data();
  args.results_stride = kRows;
  args.gradient = student.data();
  args.gradient_stride = 2 * columns;
  args.gradient_dtype = Dtype::kBFloat16;
  // Two of the instances, one of each kind: those of all would be half a minute of compiling.
  simt::launch(kRows, kThreads, seed, [&] { row_divergence_kernel<Divergence::kJensenShannon, false>(args); });
  args.student.transform = args.teacher.transform;
  args.numbers = {0.0f, 1.0f, 1.0f, 0.0f, -1.0f, false};
  args.gradient_stride = columns;
  args.gradient_dtype = Dtype::kFloat32;
  simt::launch(kRows, kThreads, seed, [&] { row_divergence_kernel<Divergence::kReverseKl, true>(args); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "clean";
  if (what == "clean") {
    // Shares that are whole, and rows of which every second one starts at no 16-byte boundary.
    for (int64_t columns : {4096, 4099}) run(columns, columns, 0, 0);
  } else if (what == "reads-behind-the-row") {
    run(0, 4099, 1, 0);
  } else if (what == "reads-behind-the-bias") {
    run(0, 4099, 0, 1);
  } else {
    return 2;
  }
  std::puts("finished");
}
