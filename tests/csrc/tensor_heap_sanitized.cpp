// Takes and frees memory of the tensor heap in several threads, under a sanitizer: each block holds what was written
// to it until it is freed, none lies in another, and a forked child finds the blocks of its parent.
#include "cpu/tensor_heap.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

struct Block {
  uint64_t* data;
  std::size_t numbers;
  uint64_t value;

  // One number a page, and the last one.
  template <typename F>
  void for_numbers(F f) const {
    for (std::size_t i = 0; i < numbers; i += 512) f(data[i]);
    f(data[numbers - 1]);
  }
};

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void check_and_free(const Block& block) {
  block.for_numbers([&](uint64_t& number) { check(number == block.value, "a block lost its numbers"); });
  trl_fast::free_kept(block.data);
}

Block take(std::size_t bytes, uint64_t value) {
  auto* const data = static_cast<uint64_t*>(trl_fast::take_kept(bytes));
  check(data && trl_fast::is_kept(data), "the heap has no memory");
  const Block block = {data, bytes / sizeof(uint64_t), value};
  block.for_numbers([&](uint64_t& number) { number = value; });
  return block;
}

void take_and_free(int thread) {
  std::mt19937 random(thread);
  std::vector<Block> blocks;
  for (uint64_t i = 0; i < 400; ++i) {
    if (blocks.size() < 12 && random() % 3 != 0) {
      const std::size_t bytes = trl_fast::kKeptFromBytes + random() % (std::size_t{3} << 20) / 8 * 8;
      blocks.push_back(take(bytes, i << 8 | thread));
    } else if (!blocks.empty()) {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      check_and_free(blocks.back());
      blocks.pop_back();
    }
    if (i % 50 == 0) trl_fast::release_freed();
    if (i % 70 == 0) {
      trl_fast::keep_freed();
      trl_fast::give_back_freed();
    }
  }
  for (const Block& block : blocks) check_and_free(block);
}

void fork_with_a_block() {
  const Block block = take(std::size_t{4} << 20, 7);
  const pid_t child = fork();
  if (child == 0) {
    const Block own = take(std::size_t{2} << 20, 8);
    check_and_free(block);
    check_and_free(own);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child found other numbers");
  check_and_free(block);
}

}  // namespace

int main() {
  check(trl_fast::take_kept(std::size_t{2} << 20) == nullptr, "nothing is kept yet");
  if (!trl_fast::keep_freed()) {
    std::puts("addresses are limited");
    return 0;
  }
  check(trl_fast::take_kept(trl_fast::kKeptFromBytes - 1) == nullptr, "small tensors are the C library's");
  fork_with_a_block();
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) threads.emplace_back(take_and_free, thread);
  for (std::thread& thread : threads) thread.join();
  const Block last = take(std::size_t{2} << 20, 9);
  trl_fast::give_back_freed();
  check(trl_fast::take_kept(std::size_t{2} << 20) == nullptr, "nothing is kept any more");
  check_and_free(last);
  std::puts("done");
}
