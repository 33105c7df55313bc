// Runs the scoring of tiles and the merging of their parts under a sanitizer, or plants a defect that the sanitizer
// has to find; argv[1] names it.
#include <cstdio>
#include <string>

#ifdef TRL_FAST_PLANT_MISSING_BARRIER
#include "support/simt.h"
#define __syncthreads()
#endif
#include "support/simt_tile_scores.h"

using namespace trl_fast;

namespace {

constexpr int64_t kEverything = kEntropy | kLogSumSqProbs | kMeanLogits | kIsTop1, kSlots = 6;

template <typename T>
std::vector<T> filled(int64_t count, T value) {
  std::vector<T> found(count, value);
  found.shrink_to_fit();
  return found;
}

// How many of what the kernels need is not there.
struct Missing {
  int words, raw, parts, bias;
};

// Heap buffers of exactly the size that the kernels may touch.
void run(unsigned seed, int rows, int columns, const Missing& missing = {}) {
  std::vector<float> products = filled(int64_t{rows} * columns, 0.0f), bias = filled(columns - missing.bias, 0.25f);
  for (size_t i = 0; i < products.size(); ++i) products[i] = 0.01f * (i * 37 % 1009) - 5.0f;
  std::vector<int64_t> targets;
  for (int r = 0; r < rows; ++r) targets.push_back(int64_t{r} * 29 % columns);
  targets.shrink_to_fit();
  const int64_t num_parts = (columns + kPartColumns - 1) / kPartColumns, stride = (columns + 7) / 8 * 8;
  const int64_t kept = (rows - 1) * stride + columns;
  std::vector<float> sums = filled(kSlots * num_parts * rows - missing.parts, 0.0f);
  std::vector<float> tops = filled(num_parts * rows, 0.0f);
  std::vector<double> state = filled(int64_t{kNumStates} * rows, 0.0);
  std::vector<uint16_t> words = filled(kept - missing.words, uint16_t{0});
  std::vector<float> raw = filled(kept - missing.raw, 0.0f);
  const Parts parts = {sums.data(), num_parts * rows, rows};
  TileScoreArgs args = {};
  args.targets = targets.data();
  args.transform = {bias.data(), 0.5f, 30.0f, 1.25f};
  args.outputs = kEverything;
  args.rows = rows;
  args.columns = columns;
  args.parts = parts;
  args.state = state.data();
  args.state_stride = rows;
  args.words = words.data();
  args.kept_stride = stride;
  run_tiles(args, products.data(), columns, seed);
  args.words = nullptr;
  args.raw = raw.data();
  run_tiles(args, products.data(), columns, seed);
  run_merge({parts, rows, num_parts, kEverything, state.data(), rows, tops.data(), num_parts}, seed);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "clean";
  if (what == "clean") {
    // Rows and columns around a tile's; words that end within sixteen bytes.
    run(0, 1, 1);
    run(1, 130, 67);
    run(2, 40, 901);
  } else if (what == "words-behind-the-row") {
    run(0, 3, 67, {.words = 1});
  } else if (what == "raw-behind-the-row") {
    run(0, 3, 67, {.raw = 1});
  } else if (what == "parts-behind-the-last") {
    run(0, 3, 67, {.parts = 1});
  } else if (what == "reads-behind-the-bias") {
    run(0, 3, 67, {.bias = 1});
  } else {
    return 2;
  }
  std::puts("finished");
}
