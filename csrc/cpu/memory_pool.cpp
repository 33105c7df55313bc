#include "memory_pool.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <vector>

#include "tensor_heap.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace trl_fast {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct Block {
  void* data;
  std::size_t bytes;
};

#ifdef __linux__

// Straight from the system, so that what is released leaves the address space: free() may keep it in the heap.
void* take_pages(std::size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  return begin + before;
}

void release(const Block& block) { munmap(block.data, block.bytes); }

#else

void* take_pages(std::size_t bytes) { return std::aligned_alloc(kHugePage, bytes); }

void release(const Block& block) { std::free(block.data); }

#endif

// Says once that held memory went back: from then on steps may take theirs from the system each time.
void warn_that_memory_is_short(std::size_t bytes) {
  TORCH_WARN_ONCE(
      "trl_fast: memory is short, so ", bytes >> 20,
      " MiB that were held for the next step went back to "
      "the system; steps that take memory anew are slower. TRL_FAST_HELD_BYTES sets how much may be held.");
}

Block fresh(std::size_t bytes) {
  const std::size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = take_pages(rounded);
  if (!data) {
    if (const std::size_t held = release_pool()) {
      warn_that_memory_is_short(held);
      data = take_pages(rounded);
    }
  }
  TORCH_CHECK_WITH(OutOfMemoryError, data, "trl_fast: no memory for ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data, rounded, MADV_HUGEPAGE);
#endif
  // Every thread touches its share: a matrix product into fresh pages would wait for each of them.
  at::parallel_for(0, static_cast<int64_t>(rounded), kHugePage,
                   [&](int64_t begin, int64_t end) { std::memset(static_cast<char*>(data) + begin, 0, end - begin); });
  return {data, rounded};
}

class MemoryPool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    Block* block = new Block(take(bytes));
    c10::profiledCPUMemoryReporter().New(block->data, block->bytes);
    return {block->data, block, &MemoryPool::deleter, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  std::size_t free_bytes() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return total();
  }

  std::size_t clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    const std::size_t bytes = total();
    for (const Block& block : free_) release(block);
    free_.clear();
    return bytes;
  }

 private:
  static void deleter(void* context);

  // The smallest block that is large enough and less than twice too large.
  Block take(std::size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes / 2 <= bytes;
        if (fits && (best == free_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != free_.end()) {
        const Block block = *best;
        free_.erase(best);
        return block;
      }
      // The new block takes the place of those that were nearly large enough.
      std::vector<Block> others;
      for (const Block& block : free_) {
        if (block.bytes < bytes && block.bytes > bytes / 2) {
          release(block);
        } else {
          others.push_back(block);
        }
      }
      free_ = std::move(others);
    }
    return fresh(bytes);
  }

  void give(const Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    const std::lock_guard<std::mutex> guard(mutex_);
    free_.push_back(block);
    while (!free_.empty() && total() > limit_) {  // the oldest first
      release(free_.front());
      free_.erase(free_.begin());
    }
  }

  std::size_t total() const {
    std::size_t sum = 0;
    for (const Block& block : free_) sum += block.bytes;
    return sum;
  }

  static std::size_t limit_from_environment() {
    const char* text = std::getenv("TRL_FAST_HELD_BYTES");
    if (!text || !*text) return std::size_t{2} << 30;
    std::size_t bytes = 0;
    const char* end = text + std::strlen(text);
    const auto [rest, error] = std::from_chars(text, end, bytes);
    TORCH_CHECK_VALUE(error == std::errc() && rest == end, "TRL_FAST_HELD_BYTES=", text,
                      ": expected a whole number of bytes, such as 2147483648");
    return bytes;
  }

  std::mutex mutex_;
  std::vector<Block> free_;
  const std::size_t limit_ = limit_from_environment();
};

// Never destroyed: tensors may outlive every static object.
MemoryPool& pool() {
  static MemoryPool* const instance = new MemoryPool;
  return *instance;
}

void MemoryPool::deleter(void* context) {
  Block* block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->data);
  pool().give(*block);
  delete block;
}

// The process's CPU allocator. While a trainer keeps what it frees, large tensors come from the tensor heap; and
// before an allocation fails, the pool gives its free blocks back. Where address space is limited (RLIMIT_AS,
// overcommit mode 2) the system cannot take them: MADV_FREE gives up pages, not addresses.
class CPUAllocator final : public c10::Allocator {
 public:
  explicit CPUAllocator(c10::Allocator* inner) : inner_(inner) { free_others = inner->raw_deleter(); }

  c10::DataPtr allocate(std::size_t bytes) override {
    if (void* const data = take_kept(bytes)) {
      c10::profiledCPUMemoryReporter().New(data, bytes);
      return {data, data, &free_any, c10::Device(c10::kCPU)};
    }
    std::size_t held = 0;
    try {
      return inner_->allocate(bytes);
    } catch (const std::exception&) {
      release_freed();
      held = release_pool();
      if (!held) throw;
    }
    warn_that_memory_is_short(held);
    return inner_->allocate(bytes);
  }

  bool is_simple_data_ptr(const c10::DataPtr& data) const override { return inner_->is_simple_data_ptr(data); }

  c10::DeleterFnPtr raw_deleter() const override { return &free_any; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { inner_->copy_data(to, from, bytes); }

 private:
  static void free_any(void* data) {
    if (!is_kept(data)) return free_others(data);
    c10::profiledCPUMemoryReporter().Delete(data);
    free_kept(data);
  }

  static inline c10::DeleterFnPtr free_others = nullptr;
  c10::Allocator* const inner_;
};

}  // namespace

c10::Allocator* memory_pool() { return &pool(); }

void install_cpu_allocator() {
  static CPUAllocator* const allocator = new CPUAllocator(c10::GetCPUAllocator());  // never destroyed, as the pool
  c10::SetCPUAllocator(allocator);
}

std::size_t pool_free_bytes() { return pool().free_bytes(); }

std::size_t release_pool() { return pool().clear(); }

}  // namespace trl_fast
