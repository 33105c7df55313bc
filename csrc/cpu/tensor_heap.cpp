#include "tensor_heap.h"

#ifdef __linux__

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace trl_fast {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// Addresses are made usable so many bytes at a time.
constexpr std::size_t kGrowth = std::size_t{64} << 20;
constexpr std::size_t kLine = 64;
// Lies between two tensors: were all to begin at one place of a page, they would meet in the same sets of a cache.
constexpr std::size_t kBetween = 5 * kLine;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

class TensorHeap {
 public:
  bool keep() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!begin_ && !reserve()) return false;
    ++keepers_;
    return true;
  }

  void give_back() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (--keepers_ == 0) release_holes();
  }

  std::size_t release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return release_holes();
  }

  void* take(std::size_t bytes) {
    if (bytes < kKeptFromBytes || keepers_ == 0) return nullptr;
    const std::lock_guard<std::mutex> guard(mutex_);
    const std::size_t size = rounded_up(bytes, kLine) + kBetween;
    char* data = nullptr;
    const auto smallest = by_size_.lower_bound({size, nullptr});
    if (smallest != by_size_.end()) {
      const auto [hole_size, hole] = *smallest;
      remove_hole(holes_.find(hole));
      if (hole_size > size) add_hole(hole + size, hole_size - size);
      data = hole;
    } else {
      data = grow(size);
    }
    if (data) sizes_.emplace(data, size);
    return data;
  }

  bool has(const void* data) const {
    const char* const begin = begin_;
    return begin && data >= begin && data < begin + reserved_;
  }

  void free(void* data) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = sizes_.find(static_cast<char*>(data));
    char* begin = found->first;
    char* end = begin + found->second;
    sizes_.erase(found);
    // The holes beside it become one with it.
    auto next = holes_.lower_bound(begin);
    if (next != holes_.end() && next->first == end) {
      end += next->second;
      next = remove_hole(next);
    }
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == begin) {
        begin = before->first;
        remove_hole(before);
      }
    }
    add_hole(begin, end - begin);
    if (keepers_ == 0) give_pages(begin, end - begin);
  }

 private:
  using Holes = std::map<char*, std::size_t>;

  // Takes addresses, as many as the machine has memory. They cost nothing until they are used, but where they are
  // limited, and then all else needs them.
  bool reserve() {
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return false;
    const std::size_t memory = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    const std::size_t wanted = rounded_up(memory, kHugePage);
    void* const mapped =
        mmap(nullptr, wanted + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return false;
    const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(mapped) % kHugePage) % kHugePage;
    reserved_ = wanted;
    top_ = usable_ = static_cast<char*>(mapped) + before;
#ifdef MADV_HUGEPAGE
    madvise(top_, reserved_, MADV_HUGEPAGE);
#endif
    begin_ = top_;
    // A child gets the heap as it is between two calls, without what is free: while it had those pages too, the parent
    // would copy each that it writes to.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] {
                     instance().release_holes();
                     instance().mutex_.unlock();
                   });
    return true;
  }

  // Returns so many bytes at the top, with the hole that ends there.
  char* grow(std::size_t size) {
    char* data = top_;
    const auto last = holes_.empty() ? holes_.end() : std::prev(holes_.end());
    const bool joins = last != holes_.end() && last->first + last->second == top_;
    if (joins) data = last->first;
    const std::size_t offset = data - begin_;
    if (size > reserved_ - offset) return nullptr;
    if (data + size > usable_) {
      const std::size_t missing = data + size - usable_;
      const std::size_t bytes = std::min<std::size_t>(rounded_up(missing, kGrowth), begin_ + reserved_ - usable_);
      if (mprotect(usable_, bytes, PROT_READ | PROT_WRITE) != 0) return nullptr;
      usable_ += bytes;
    }
    if (joins) remove_hole(last);
    top_ = data + size;
    return data;
  }

  void add_hole(char* begin, std::size_t size) {
    holes_.emplace(begin, size);
    by_size_.emplace(size, begin);
  }

  Holes::iterator remove_hole(Holes::iterator hole) {
    by_size_.erase({hole->second, hole->first});
    return holes_.erase(hole);
  }

  std::size_t release_holes() {
    std::size_t bytes = 0;
    for (const auto& [begin, size] : holes_) {
      give_pages(begin, size);
      bytes += size;
    }
    return bytes;
  }

  // Whole pages alone: the first and the last may have a tensor's numbers, too.
  static void give_pages(char* begin, std::size_t size) {
    const std::size_t page = sysconf(_SC_PAGESIZE);
    const std::uintptr_t first = rounded_up(reinterpret_cast<std::uintptr_t>(begin), page);
    const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(begin + size) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }

 public:
  // Never destroyed: tensors may outlive every static object.
  static TensorHeap& instance() {
    static TensorHeap* const heap = new TensorHeap;
    return *heap;
  }

 private:
  std::mutex mutex_;
  std::atomic<int> keepers_{0};
  std::atomic<char*> begin_{nullptr};
  std::size_t reserved_ = 0;
  char* top_ = nullptr;     // of what was ever used
  char* usable_ = nullptr;  // the end of the addresses that can be read and written
  Holes holes_;             // by their places: none touches another
  std::set<std::pair<std::size_t, char*>> by_size_;
  std::unordered_map<char*, std::size_t> sizes_;  // of what is in use
};

}  // namespace

bool keep_freed() { return TensorHeap::instance().keep(); }

void give_back_freed() { TensorHeap::instance().give_back(); }

std::size_t release_freed() { return TensorHeap::instance().release(); }

void* take_kept(std::size_t bytes) { return TensorHeap::instance().take(bytes); }

bool is_kept(const void* data) { return TensorHeap::instance().has(data); }

void free_kept(void* data) { TensorHeap::instance().free(data); }

}  // namespace trl_fast

#else

namespace trl_fast {

bool keep_freed() { return false; }

void give_back_freed() {}

std::size_t release_freed() { return 0; }

void* take_kept(std::size_t) { return nullptr; }

bool is_kept(const void*) { return false; }

void free_kept(void*) {}

}  // namespace trl_fast

#endif
