// Runs the CUDA row kernels under a sanitizer, or plants a defect that the sanitizer has to find; argv[1] names it.
#include <cstdio>
#include <limits>
#include <string>

#include "support/simt.h"

#ifdef TRL_FAST_PLANT_MISSING_BARRIER
#define __syncthreads()  // a block reduction has but one
#endif
#include "cuda/packed_row_kernels.cuh"

using namespace trl_fast;

namespace {

constexpr int64_t kRows = 3, kColumns = 4099, kEverything = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1;

// Heap buffers of exactly the size that the kernels may touch.
struct Buffers {
  std::vector<__nv_bfloat16> logits, out;
  std::vector<float> bias, lse, coefficients;
  std::vector<int64_t> targets;
  std::vector<double> state;

  Buffers() : out(kRows * kColumns), bias(kColumns), lse(kRows), coefficients(4 * kRows, 0.5f), state(7 * kRows) {
    for (int64_t i = 0; i < kRows * kColumns; ++i) logits.push_back(__float2bfloat16(0.01f * (i * 37 % 1009) - 5.0f));
    logits.shrink_to_fit();
    for (int64_t r = 0; r < kRows; ++r) targets.push_back(r * 2000);
    for (int64_t r = 0; r < kRows; ++r) state[kTop * kRows + r] = -std::numeric_limits<double>::infinity();
  }

  LogitTile tile(int64_t start, int64_t columns) const {
    return {logits.data() + start, Dtype::kBFloat16, kColumns, columns, targets.data(), start};
  }

  Transform transform(int64_t start) const { return {bias.data() + start, 0.5f, 30.0f, 1.25f}; }
};

// One instance of each kernel, with all flags: those of every instance would be half a minute of compiling.
void run(const ScoreArgs& args, unsigned seed) {
  simt::launch(kRows, kThreads, seed, [&] { row_scores_kernel<__nv_bfloat16, true, true, kEverything>(args); });
}

void run(const GradArgs& args, unsigned seed) {
  const dim3 grid(kRows, grad_parts(args.tile.columns, args.tile.dtype));
  simt::launch(grid, kThreads, seed, [&] { row_grad_kernel<__nv_bfloat16, __nv_bfloat16, true, true>(args); });
}

void run_kernels(unsigned seed, int64_t excess_columns, int64_t missing_output) {
  Buffers b;
  b.out.resize(kRows * kColumns - missing_output);
  b.out.shrink_to_fit();
  const auto run_scores = [&](int64_t start, int64_t columns) {
    run(ScoreArgs{b.tile(start, columns), b.transform(start), kEverything, b.state.data(), kRows}, seed);
  };
  const int64_t cut = 1001;  // the second tile's rows start at no 16-byte boundary
  run_scores(0, cut);
  run_scores(cut, kColumns - cut + excess_columns);
  run(GradArgs{b.tile(0, kColumns), b.transform(0), b.lse.data(), b.coefficients.data(), kRows, b.out.data(), kColumns,
               Dtype::kBFloat16},
      seed);
}

// Packed and, in place, differentiated: with shares that are whole and with others.
void run_packed_kernels(unsigned seed, int64_t columns, int64_t missing_words) {
  Buffers b;
  std::vector<float> logits;
  for (int64_t i = 0; i < kRows * columns; ++i) logits.push_back(0.01f * (i * 37 % 1009) - 5.0f);
  logits.shrink_to_fit();
  std::vector<uint16_t> words(kRows * columns - missing_words);
  std::vector<float> tops(kRows * num_chunks(columns)), bias(columns);
  std::vector<int64_t> index = {0, 1, 2};
  const PackedRows packed = {{words.data(), tops.data()}, columns, num_chunks(columns), index.data()};
  const LogitTile tile = {logits.data(), Dtype::kFloat32, columns, columns, b.targets.data(), 0};
  const ScoreArgs scores = {tile, {bias.data(), 0.5f, 0.0f, 1.25f}, kEverything, b.state.data(), kRows};
  simt::launch(kRows, kThreads, seed, [&] { row_scores_packed_kernel<true, kEverything>(scores, packed); });
  GradArgs grad = {tile,         {nullptr, 0.5f, 0.0f, 1.25f},
                   b.lse.data(), b.coefficients.data(),
                   kRows,        words.data(),
                   columns,      Dtype::kBFloat16};
  grad.tile.logits = nullptr;
  const dim3 grid(kRows, (num_chunks(columns) + kBatch - 1) / kBatch);
  simt::launch(grid, kThreads, seed, [&] { row_grad_packed_kernel<__nv_bfloat16>(grad, packed); });
}

__global__ void write_shared(int index) {
  __shared__ float values[kThreads];
  values[index] = values[0];
}

__global__ void read_unwritten_shared(float* out) {
  __shared__ float values[kThreads];
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void half_at_barrier() {
  if (threadIdx.x % 2) simt::wait_at_barrier();
  __shfl_xor_sync(kWholeWarp, 0, 1);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "clean";
  if (what == "clean") {
    for (unsigned seed = 0; seed < 3; ++seed) {
      run_kernels(seed, 0, 0);
      for (int64_t columns : {kColumns, kColumns + 5}) run_packed_kernels(seed, columns, 0);
    }
  } else if (what == "reads-behind-the-row") {
    run_kernels(0, 1, 0);
  } else if (what == "writes-behind-the-row") {
    run_kernels(0, 0, 1);
  } else if (what == "writes-words-behind-the-row") {
    run_packed_kernels(0, kColumns, 1);
  } else if (what == "writes-behind-shared-memory") {
    // Into the guard behind the array, which is not as long as the array.
    simt::launch(1, kThreads, 0, [] { write_shared(kThreads + threadIdx.x % kWarpSize); });
  } else if (what == "reads-unwritten-shared-memory") {
    std::vector<float> out(kThreads);
    for (int i = 0; i < 2; ++i) simt::launch(1, kThreads, 0, [&] { read_unwritten_shared(out.data()); });
    return std::isnan(out[0] + out[kThreads - 1]) ? 0 : 1;
  } else if (what == "divergent-barrier") {
    simt::launch(1, kThreads, 0, [] { half_at_barrier(); });
  } else {
    return 2;
  }
  std::puts("finished");
}
