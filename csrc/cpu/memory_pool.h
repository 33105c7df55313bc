// A memory pool for large short-lived CPU tensors.
//
// A training step takes and gives back hundreds of megabytes for logits and the head's gradient. Fresh pages cost more
// than the row kernels do: the kernel clears them, and a virtual machine's host has to find them. So a freed block is
// kept for the next call, and its pages are offered to the system (MADV_FREE), which takes them when it runs short of
// memory and not before. Their addresses stay taken; so when an allocation of the pool or of any CPU tensor fails, the
// pool gives every free block back and the allocation is tried once more (install_cpu_allocator).
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>
#include <cstdint>

namespace trl_fast {

// A smaller tensor does not come from the pool: it would waste too much of a huge page.
constexpr int64_t kPooledFromBytes = int64_t{8} << 20;

// Returns the pool as an allocator. Its tensors are ordinary CPU tensors with uninitialised contents; their memory
// returns to the pool when they are freed.
c10::Allocator* memory_pool();

// Has the process's CPU allocator, PyTorch's, ask the tensor heap first (tensor_heap.h), and the pool for its free
// blocks before it fails. Called once, when the extension is loaded: c10::SetCPUAllocator is not thread-safe.
void install_cpu_allocator();

// Returns the bytes of the pool's free blocks. They are at most TRL_FAST_HELD_BYTES (2 GiB unless set; 0 keeps none).
// If that variable is no whole number, the first tensor of the pool raises c10::ValueError.
std::size_t pool_free_bytes();

// Gives every free block back to the system. Returns their bytes.
std::size_t release_pool();

}  // namespace trl_fast
