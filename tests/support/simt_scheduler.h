// Runs the blocks of a CUDA kernel on the host, one fiber per CUDA thread. simt.h is the header to include.
//
// A block's fibers take turns on one host thread, in an order that a seed shuffles; a fiber gives up its turn at a
// barrier or a warp operation only. Before each block, shared memory is filled with ones, which are NaN as floats. A
// block that cannot go on is reported and the process aborted.
//
// Under -fsanitize=thread every fiber is a logical thread of ThreadSanitizer, and a barrier orders what lies before it
// with what lies behind it, so that a missing barrier is reported as a data race even if the fibers' order hides it.
// Under -fsanitize=address, accesses outside heap buffers and shared arrays are reported
// (-fsanitize-sections=simt_shared makes the latter known). Not seen: races between blocks, which run one after
// another; and what GCC 12 does not instrument: a shared struct passed by value straight into a call, and nothing was
// reported at -O0. x86-64 only.
#pragma once

#include <sys/mman.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// A function that switches stacks must not be instrumented: it would enter as one thread and leave as another.
#define SIMT_UNINSTRUMENTED __attribute__((no_sanitize("thread", "address"), noinline))

// Shared arrays lie between these two; the linker defines them, unless there is no such array.
extern "C" {
extern char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

// Saves the callee-saved registers and the stack pointer of the running fiber, and takes up another.
void simt_switch(void** save, void* load);
}
asm(R"(
  .weak simt_switch
  .hidden simt_switch
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

// ThreadSanitizer's view of the fibers; nothing without it.
namespace tsan {
#ifdef __SANITIZE_THREAD__
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
SIMT_UNINSTRUMENTED inline void switch_to(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
SIMT_UNINSTRUMENTED inline void release(void* object) { __tsan_release(object); }
SIMT_UNINSTRUMENTED inline void acquire(void* object) { __tsan_acquire(object); }
#else
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif
}  // namespace tsan

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr int kSavedRegisters = 6;

enum class State { kReady, kAtBarrier, kInWarpOperation, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* tsan_fiber;
  State state;
  int barriers;               // passed so far
  uint64_t received[kLanes];  // what the warp's lanes brought to the last warp operation
};

struct Warp {
  uint64_t brought[kLanes];
  uint32_t arrived;  // a bit a lane
};

// The block that runs. Raw arrays: the code that switches fibers may call nothing that is instrumented.
inline Fiber* fibers;
inline Warp* warps;
inline int num_fibers;
inline int running;
inline void* scheduler_stack;
inline void* scheduler_tsan;
inline const std::function<void()>* body;
// Two barriers in turn: threads that reach the next one must not be ordered with those that still leave the last one.
inline char barrier_objects[2];
inline char start_object, end_object;

SIMT_UNINSTRUMENTED inline void yield() {
  tsan::switch_to(scheduler_tsan);
  simt_switch(&fibers[running].stack_pointer, scheduler_stack);
}

SIMT_UNINSTRUMENTED inline void run_fiber() {
  tsan::acquire(&start_object);
  (*body)();
  tsan::release(&end_object);
  fibers[running].state = State::kDone;
  yield();
  std::abort();  // nobody resumes a fiber that is done
}

SIMT_UNINSTRUMENTED inline void wait_at_barrier() {
  Fiber& self = fibers[running];
  char* object = &barrier_objects[self.barriers++ % 2];
  self.state = State::kAtBarrier;
  tsan::release(object);
  yield();
  tsan::acquire(object);
}

// All lanes of the running warp meet, and each receives what everyone brought. That orders no memory accesses.
SIMT_UNINSTRUMENTED inline const uint64_t* meet(uint64_t bring) {
  const int lane = running % kLanes;
  Warp& warp = warps[running / kLanes];
  Fiber* const lanes = fibers + (running - lane);
  warp.brought[lane] = bring;
  warp.arrived |= 1u << lane;
  if (warp.arrived != 0xffffffffu) {
    fibers[running].state = State::kInWarpOperation;
    yield();
    return fibers[running].received;
  }
  warp.arrived = 0;
  for (int i = 0; i < kLanes; ++i) {
    for (int k = 0; k < kLanes; ++k) lanes[i].received[k] = warp.brought[k];
    if (lanes[i].state == State::kInWarpOperation) lanes[i].state = State::kReady;
  }
  return fibers[running].received;
}

SIMT_UNINSTRUMENTED inline void poison_shared_memory() {
  for (volatile char* byte = __start_simt_shared; byte != __stop_simt_shared; ++byte) *byte = static_cast<char>(0xff);
}

// A stack that simt_switch can take up: it pops the registers and returns into run_fiber, which never returns.
SIMT_UNINSTRUMENTED inline void prepare(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // keeps the stack aligned as the ABI has it on entry to a function
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.state = State::kReady;
  fiber.barriers = 0;
}

SIMT_UNINSTRUMENTED inline void resume(int index) {
  running = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y)};
  tsan::switch_to(fibers[index].tsan_fiber);
  simt_switch(&scheduler_stack, fibers[index].stack_pointer);
}

inline int count(State state) {
  return static_cast<int>(
      std::count_if(fibers, fibers + num_fibers, [&](const Fiber& f) { return f.state == state; }));
}

[[noreturn]] inline void report_deadlock() {
  std::fprintf(stderr,
               "simt: deadlock in block (%u, %u, %u): %d threads wait at __syncthreads, %d for other lanes of ",
               blockIdx.x, blockIdx.y, blockIdx.z, count(State::kAtBarrier), count(State::kInWarpOperation));
  std::fprintf(stderr, "their warp, %d have returned\n", count(State::kDone));
  std::abort();
}

inline void run_block(std::mt19937& random) {
  std::vector<int> order(num_fibers);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < num_fibers; ++i) prepare(fibers[i]);
  std::fill_n(warps, num_fibers / kLanes, Warp{});
  tsan::release(&start_object);
  while (count(State::kDone) < num_fibers) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      if (fibers[i].state == State::kReady) resume(i);
    }
    if (count(State::kReady)) continue;
    const int waiting = count(State::kAtBarrier);
    if (waiting + count(State::kDone) < num_fibers) report_deadlock();
    for (Fiber* fiber = fibers; fiber != fibers + num_fibers; ++fiber) {
      if (fiber->state == State::kAtBarrier) fiber->state = State::kReady;
    }
  }
  tsan::acquire(&end_object);
}

// Calls `kernel` once for every thread of every block, blocks in shuffled order.
inline void launch(dim3 grid, dim3 block, unsigned seed, const std::function<void()>& kernel) {
  num_fibers = static_cast<int>(block.x * block.y * block.z);
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  if (num_fibers % kLanes || blocks.empty()) {
    std::fprintf(stderr, "simt: %zu blocks of %d threads; CUDA needs one, and only whole warps are simulated\n",
                 blocks.size(), num_fibers);
    std::abort();
  }
  const auto fiber_storage = std::make_unique<Fiber[]>(num_fibers);
  const auto warp_storage = std::make_unique<Warp[]>(num_fibers / kLanes);
  const size_t stack_bytes = num_fibers * kStackBytes;
  void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  fibers = fiber_storage.get();
  warps = warp_storage.get();
  for (int i = 0; i < num_fibers; ++i) {
    fibers[i].stack = static_cast<char*>(stacks) + i * kStackBytes;
    fibers[i].tsan_fiber = tsan::create();
  }
  blockDim = block;
  gridDim = grid;
  body = &kernel;
  scheduler_tsan = tsan::current();
  std::mt19937 random(seed);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (unsigned i : blocks) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    poison_shared_memory();
    run_block(random);
  }
  for (int i = 0; i < num_fibers; ++i) tsan::destroy(fibers[i].tsan_fiber);
  munmap(stacks, stack_bytes);
}

}  // namespace simt
