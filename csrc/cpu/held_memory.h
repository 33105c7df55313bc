// Memory for large short-lived tensors that stays at hand between calls.
//
// A training step takes and gives back hundreds of megabytes for logits and the head's gradient. Fresh pages cost more
// than the row kernels do: the kernel clears them, and a virtual machine's host has to find them. So a freed block is
// kept for the next call, and its pages are offered to the system (MADV_FREE), which takes them when it runs short of
// memory and not before.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace trl_fast {

// The allocator; its tensors are ordinary CPU tensors, whose memory comes back here. Contents are not initialised.
c10::Allocator* held_memory();

// Bytes of free blocks that are held now. At most TRL_FAST_HELD_BYTES (2 GiB unless set; 0 holds nothing), which has
// to be a whole number: else the first tensor raises c10::ValueError.
std::size_t held_bytes();

// Gives every free block back to the system; how many bytes that were.
std::size_t release_held_memory();

}  // namespace trl_fast
