// Runs the CUDA kernel that merges attention under a sanitizer; argv[1] names what it is told of more than there is,
// "clean" for nothing.
#include <cstdio>
#include <string>
#include <vector>

#include "support/simt.h"

// After the vocabulary that the kernel is written in.
#include "cuda/attention_merge.cuh"

using namespace trl_fast;

namespace {

constexpr int64_t kTokens = 70, kOthers = 5, kHeads = 3;

// Heap buffers of exactly the size that the kernel may touch.
std::vector<float> numbers(int64_t count) {
  std::vector<float> found;
  for (int64_t i = 0; i < count; ++i) found.push_back(0.01f * (i * 37 % 1009) - 5.0f);
  found.shrink_to_fit();
  return found;
}

// begin: of the first output, where its first number is.
void run(unsigned seed, int64_t width, int64_t begin, int64_t excess_tokens, int64_t excess_width,
         int64_t excess_place) {
  const auto out = numbers(begin + kTokens * kHeads * width), other = numbers(kOthers * kHeads * width);
  const auto lse = numbers(kHeads * kTokens), other_lse = numbers(kHeads * kOthers);
  auto merged = numbers(kTokens * kHeads * (width + excess_width)), merged_lse = lse;
  std::vector<int32_t> place(kTokens + excess_tokens, -1);
  for (int32_t i = 0; i < kOthers; ++i) place[7 + 13 * i] = i;
  place[kTokens - 1] = static_cast<int32_t>(kOthers - 1 + excess_place);
  AttentionMergeArgs args = {};
  args.first = {out.data() + begin, kHeads * width, width, lse.data(), kTokens};
  args.second = {other.data(), kHeads * width, width, other_lse.data(), kOthers};
  args.place = place.data();
  args.tokens = kTokens + excess_tokens;
  args.heads = kHeads;
  args.width = width + excess_width;
  args.merged = merged.data();
  args.merged_lse = merged_lse.data();
  dispatch_attention_merge(args, [&](auto kernel, dim3 grid, const auto&... given) {
    simt::launch(grid, kThreads, seed, [&] { kernel(given...); });
  });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "clean";
  const auto excess = [&](const char* of) { return what == of ? 1 : 0; };
  // Rows of packs and others; some have more blocks than one.
  for (int64_t width : {64, 17, 1, 1100}) run(width, width, 0, 0, 0, 0);
  run(0, 64, 1, 0, 0, 0);
  run(1, 64, 0, excess("token"), 0, excess("place"));
  run(2, 17, 0, 0, excess("width"), 0);
  std::puts("finished");
}
