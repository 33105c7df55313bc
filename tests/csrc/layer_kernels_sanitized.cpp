// Runs the CUDA kernels of layers under a sanitizer; argv[1] names the kernel that is told of more than there is,
// "clean" for none.
#include <cstdio>
#include <string>
#include <vector>

#include "support/simt.h"

#ifdef TRL_FAST_PLANT_MISSING_BARRIER
#define __syncthreads()
#endif
#include "cuda/rotary_kernels.cuh"

using namespace trl_fast;

namespace {

// Heap buffers of exactly the size that a kernel may touch.
std::vector<float> numbers(int64_t count) {
  std::vector<float> found;
  for (int64_t i = 0; i < count; ++i) found.push_back(0.01f * (i * 37 % 1009) - 5.0f);
  found.shrink_to_fit();
  return found;
}

// Instances of one type alone: those of all would be half a minute of compiling.
template <int kLanes, int kPacks, bool kWhole>
void run_norm(unsigned seed, int64_t columns, int64_t excess_rows) {
  constexpr int64_t kRows = 5, kWorkers = 2;
  const auto x = numbers(kRows * columns), residual = x, grad = x, weight = numbers(columns);
  auto out = x, sum = x, rstd = numbers(kRows + excess_rows), partials = numbers(kWorkers * columns);
  NormArgs args = {};
  args.weight = {weight.data(), Dtype::kFloat32, NormCast::kLlama, columns};
  args.x = {x.data(), {1, kRows + excess_rows}, {0, 0, columns}};
  args.residual = args.grad = args.grad_sum = args.x;
  args.residual.data = residual.data();
  args.grad.data = args.grad_sum.data = grad.data();
  args.rows = kRows + excess_rows;
  args.rstd = rstd.data();
  args.sum = sum.data();
  args.out = out.data();
  simt::launch(grid_of(ceil_div(args.rows, kThreads / kLanes)), kThreads, seed,
               [&] { rms_norm_kernel<float, kLanes, kPacks, kWhole>(args); });
  args.partials = partials.data();
  simt::launch(grid_of(ceil_div(kWorkers, kThreads / kLanes)), kThreads, seed,
               [&] { rms_norm_backward_kernel<float, kLanes, kPacks, kWhole>(args, kWorkers); });
}

template <bool kWhole>
void run_gate(unsigned seed, int64_t columns, int64_t excess_columns) {
  constexpr int64_t kRows = 3;
  const auto both = numbers(kRows * 2 * columns), grad = numbers(kRows * columns);
  auto out = grad, grads = both;
  GateArgs args = {};
  args.gate = both.data();
  args.up = both.data() + columns;
  args.stride = args.grad_stride = 2 * columns;
  args.columns = columns + excess_columns;
  args.out = out.data();
  args.grad = grad.data();
  args.grad_gate = grads.data();
  args.grad_up = grads.data() + columns;
  const int blocks = static_cast<int>(ceil_div(args.columns, 4 * kThreads));
  simt::launch(grid_of(kRows * blocks), kThreads, seed, [&] { gate_kernel<float, kWhole>(args, blocks); });
  simt::launch(grid_of(kRows * blocks), kThreads, seed, [&] { gate_backward_kernel<float, kWhole>(args, blocks); });
}

template <bool kWhole>
void run_heads(unsigned seed, int64_t width, int64_t turned, int64_t excess_turned, int64_t excess_norm) {
  constexpr int64_t kHeads = 3, kTokens = 5, kRows = kHeads * kTokens, kWorkers = 2;
  const auto x = numbers(kRows * width), grad = x, angles = numbers(kTokens * turned), weight = numbers(width);
  auto out = x, rstd = numbers(kRows), partials = numbers(kWorkers * (width - excess_norm));
  NormRotaryArgs args = {};
  args.heads = {x.data(), {kRows * width, width, kHeads * width}, Dtype::kFloat32, kHeads, kTokens, width};
  Turns turns = {angles.data(), angles.data(), {0, turned}, {0, turned}, Dtype::kFloat32};
  turns.width = turned + excess_turned;
  args.turns = turns;
  args.norm = {weight.data(), Dtype::kFloat32, NormCast::kLlama, width};
  args.rstd = rstd.data();
  args.out = out.data();
  const dim3 grid = grid_of(ceil_div(kRows, kThreads / kHeadLanes));
  const RotaryArgs alone = {args.heads, turns, out.data()};
  simt::launch(grid, kThreads, seed, [&] { rotary_kernel<float, kWhole>(alone, kRows); });
  simt::launch(grid, kThreads, seed, [&] { norm_rotary_kernel<float, kWhole>(args, kRows); });
  args.turns.is_backward = true;
  args.grad = grad.data();
  for (int i = 0; i < 3; ++i) args.grad_strides[i] = args.heads.x_strides[i];
  args.partials = partials.data();
  simt::launch(1, kThreads, seed, [&] { norm_rotary_backward_kernel<float, kWhole>(args, kRows, kWorkers); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "clean";
  const auto excess = [&](const char* of) { return what == of ? 1 : 0; };
  // Of whole packs and not; and longer than what threads have in registers.
  for (int64_t columns : {64, 1028}) run_norm<64, 2, true>(columns, columns, excess("norm"));
  run_norm<kThreads, 2, false>(0, 130, excess("norm"));
  run_norm<kThreads, 2, false>(1, 2051, 0);
  if (what != "gate") run_gate<true>(0, 640, 0);
  run_gate<false>(1, 1001, excess("gate"));
  run_heads<true>(0, 64, 32, 0, 0);
  run_heads<false>(1, 14, 6, 2 * excess("rotary"), 4 * excess("norm_rotary"));
  run_heads<true>(2, 240, 240, 0, 0);
  std::puts("finished");
}
