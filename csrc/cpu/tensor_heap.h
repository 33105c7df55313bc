// A heap for the large CPU tensors of a training, which keeps their memory from step to step.
//
// A step frees gigabytes of activations and takes as much again in the next. The C library gives large blocks back to
// the system, which clears each page before it hands it out anew. Told to keep them, it lays small objects that last
// in between, so that in some processes a large tensor finds no hole, and memory grows. Here are large tensors only,
// each in the smallest hole that it fits into, and in huge pages where the system has them.
#pragma once

#include <cstddef>

namespace trl_fast {

// A smaller tensor is the C library's.
constexpr std::size_t kKeptFromBytes = std::size_t{1} << 20;

// From now on large tensors are made in the heap, and their memory stays there when they are freed: until
// give_back_freed() was called as often. Returns false, and changes nothing, where the heap cannot have its addresses.
bool keep_freed();

// After the last call, what is free goes to the system at once, and so does what is freed later.
void give_back_freed();

// Gives the pages of what is free to the system. Returns how many bytes lie in holes.
std::size_t release_freed();

// Returns memory for a tensor; null where nothing is kept, the tensor is small or the heap is full.
void* take_kept(std::size_t bytes);

bool is_kept(const void* data);

// Takes back what take_kept returned.
void free_kept(void* data);

}  // namespace trl_fast
