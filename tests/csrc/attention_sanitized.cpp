// Runs attention over rows of token trees under a sanitizer, on heap buffers of exactly the size that it may touch, on
// one thread and on several; their results must be the same bits. In float32, or by emulated tiles of bfloat16.
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifdef TRL_FAST_PLANT_NO_TURNS
// Nobody waits for the spans before, nor is ordered by them: two threads add to gradients of queries at once.
#define sched_yield() break
#undef __ATOMIC_ACQUIRE
#undef __ATOMIC_RELEASE
#define __ATOMIC_ACQUIRE __ATOMIC_RELAXED
#define __ATOMIC_RELEASE __ATOMIC_RELAXED
#endif
#ifdef TRL_FAST_TILES
#include "cpu/attention_bf16_kernels.cpp"
namespace trl_fast {
const AttentionKernels kAttentionKernelsDEFAULT = {};  // for other dtypes
}  // namespace trl_fast
using Number = BFloat16;
constexpr trl_fast::Dtype kDtype = trl_fast::Dtype::kBFloat16;
#else
#include "cpu/attention_kernels.cpp"
using Number = float;
constexpr trl_fast::Dtype kDtype = trl_fast::Dtype::kFloat32;
#endif
#include "cpu/attention_plan.h"

namespace {

using trl_fast::AttentionRow;

const trl_fast::AttentionKernels& kernels = trl_fast::TRL_FAST_JOIN(kAttentionKernels, CPU_CAPABILITY);

struct Shape {
  int64_t groups, group_size, width, value_width, window;
  std::vector<int64_t> segments, runs;
  float softcap;

  int64_t tokens() const { return segments.empty() ? 0 : segments[segments.size() - 3]; }
};

// (heads, T, D) of numbers between -1 and 1, tokens first.
template <typename T = Number>
struct HeadsMemory {
  std::unique_ptr<T[]> data;
  int64_t heads, width, size;

  HeadsMemory(int64_t heads, int64_t tokens, int64_t width, int seed)
      : data(new T[heads * tokens * width]), heads(heads), width(width), size(heads * tokens * width) {
    for (int64_t i = 0; i < size; ++i) {
      narrow_part(splat(seed ? std::sin(static_cast<float>(seed * (i + 1))) : NAN), 1, &data[i]);
    }
  }
  AttentionHeads get() const { return {data.get(), width, heads * width}; }
  void append_to(std::vector<float>& all) const {
    for (int64_t i = 0; i < size; ++i) all.push_back(widen_one(data[i]));
  }
};

template <typename F>
void run_in_order(int num_threads, int64_t tasks, int64_t scratch_size, F task) {
  std::atomic<int64_t> next = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&] {
      const std::unique_ptr<float[]> scratch(new float[scratch_size]);
      for (int64_t n = next++; n < tasks; n = next++) task(n, scratch.get());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Returns all results, one behind the other.
std::vector<float> run(const Shape& shape, int num_threads) {
  const int64_t tokens = shape.tokens(), heads = shape.groups * shape.group_size;
  const HeadsMemory<> query(heads, tokens, shape.width, 1), key(shape.groups, tokens, shape.width, 2);
  const HeadsMemory<> value(shape.groups, tokens, shape.value_width, 3), grad(heads, tokens, shape.value_width, 4);
  const HeadsMemory<> out(heads, tokens, shape.value_width, 0), grad_key(shape.groups, tokens, shape.width, 0);
  const HeadsMemory<float> grad_query(heads, tokens, shape.width, 0);
  const HeadsMemory<> grad_value(shape.groups, tokens, shape.value_width, 0);
  std::fill(grad_query.data.get(), grad_query.data.get() + grad_query.size, 0.0f);
  AttentionRow row(shape.segments.data(), static_cast<int64_t>(shape.segments.size()) / 4, shape.runs.data(),
                   static_cast<int64_t>(shape.runs.size()) / 2, false, tokens);
  AttentionArgs args = {};
  args.dtype = kDtype;
  args.tokens = tokens;
  args.groups = shape.groups;
  args.group_size = shape.group_size;
  args.width = shape.width;
  args.value_width = shape.value_width;
  args.scale = 0.3f;
  args.softcap = shape.softcap;
  args.query = query.get();
  args.key = key.get();
  args.value = value.get();
  args.out = out.get();
  args.grad = grad.get();
  args.grad_query = grad_query.get();
  args.grad_key = grad_key.get();
  args.grad_value = grad_value.get();
  std::vector<float> lse(heads * tokens), deltas(heads * tokens);
  args.lse = lse.data();
  args.deltas = deltas.data();
  plan_attention(args, row, shape.window);
  std::vector<float> keys(kernels.packed_keys_size(args)), values(kernels.packed_values_size(args));
  args.packed_keys = keys.data();
  args.packed_values = values.data();
  kernels.pack(args, 0, args.groups * args.num_blocks);
  run_in_order(num_threads, args.groups * args.num_tiles, kernels.forward_scratch(args),
               [&](int64_t task, float* scratch) { kernels.forward(args, task, scratch); });
  kernels.prepare_backward(args, 0, tokens);
  run_in_order(num_threads, args.groups * args.num_spans, kernels.backward_scratch(args),
               [&](int64_t task, float* scratch) { kernels.backward(args, task, scratch); });
  std::vector<float> all = lse;
  for (const HeadsMemory<>* memory : {&out, &grad_key, &grad_value}) memory->append_to(all);
  grad_query.append_to(all);
  return all;
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {
      {2, 3, 16, 16, 400, {0, 150, 400, 0, 150, 230, 230, 150, 230, 400, 400, 150}, {}, 0.0f},
      {1, 1, 5, 3, 20, {0, 1, 1, 0, 1, 131, 131, 0}, {40, 90, 100, 101}, 1.5f},
      {1, 7, 1, 9, 65, {0, 65, 65, 0}, {}, 0.0f},
      {1, 2, 8, 8, 30, {0, 7, 12, 0, 7, 12, 12, 7, 12, 13, 13, 0, 13, 83, 90, 0, 83, 90, 90, 70}, {20, 25}, 0.0f},
      {1, 2, 2, 2, 700, {0, 1050, 1060, 0, 1050, 1060, 1060, 1050}, {}, 0.0f},
      {2, 1, 8, 8, 1, {}, {}, 0.0f},
  };
  for (const Shape& shape : shapes) {
    const std::vector<float> alone = run(shape, 1), together = run(shape, 4);
    for (float x : alone) {
      if (!std::isfinite(x)) return std::puts("a result was not written"), 1;
    }
    if (alone.size() && std::memcmp(alone.data(), together.data(), alone.size() * sizeof(float))) {
      return std::puts("threads change bits"), 1;
    }
  }
  std::puts("done");
}
