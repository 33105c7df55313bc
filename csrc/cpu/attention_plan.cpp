// Plans attention over a row of token trees.
#include "attention_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace trl_fast {
namespace {

// Tokens of a tile: about kAimedRows rows, in whole strips.
int64_t tile_tokens(int64_t group_size) {
  const int64_t step = kMostStripRows / std::gcd(kMostStripRows, group_size);
  return std::max<int64_t>(1, (kAimedRows / group_size + step / 2) / step) * step;
}

// How far the keys of a block are seen: before which token their readers end, and the last of their positions.
struct Reach {
  int64_t readers_end = 0, last_position = 0;
};

std::vector<Reach> reach_of_blocks(const AttentionRow& row, const AttentionArgs& args) {
  std::vector<Reach> reach(args.num_blocks);
  for (const TreeSegment& s : row.segments) {
    for (int64_t block = s.start / kKeyBlock; block * kKeyBlock < s.end; ++block) {
      const int64_t last = std::min((block + 1) * kKeyBlock, s.end) - 1;
      reach[block].readers_end = std::max(reach[block].readers_end, s.tree_end);
      reach[block].last_position = std::max<int64_t>(reach[block].last_position, row.positions[last]);
    }
  }
  return reach;
}

}  // namespace

AttentionRow::AttentionRow(const int64_t* segment_numbers, int64_t num_segments, const int64_t* run_numbers,
                           int64_t num_runs, bool whole_runs, int64_t tokens)
    : first_in_runs(tokens), ends_of_runs(tokens) {
  int64_t next = 0;
  for (int64_t n = 0; n < num_segments; ++n) {
    const int64_t* const given = segment_numbers + 4 * n;
    const TreeSegment s = {given[0], given[1], given[2], given[3]};
    if (s.start != next || s.end < s.start || s.tree_end < s.end || s.tree_end > tokens) {
      throw std::invalid_argument("segments: number " + std::to_string(n) + " does not stand behind the one before");
    }
    next = s.end;
    if (s.end > s.start) segments.push_back(s);
    for (int64_t t = s.start; t < s.end; ++t) positions.push_back(s.offset + t - s.start);
  }
  if (next != tokens) {
    throw std::invalid_argument("segments: they have " + std::to_string(next) + " tokens, the row has " +
                                std::to_string(tokens));
  }
  std::iota(first_in_runs.begin(), first_in_runs.end(), 0);
  std::iota(ends_of_runs.begin(), ends_of_runs.end(), 1);
  for (int64_t n = 0; n < num_runs; ++n) {
    const int64_t start = run_numbers[2 * n], end = run_numbers[2 * n + 1];
    if (start < 0 || end > tokens)
      throw std::invalid_argument("runs: number " + std::to_string(n) + " leaves the row");
    for (int64_t t = start; t < end; ++t) {
      if (whole_runs) first_in_runs[t] = start;
      ends_of_runs[t] = end;
    }
  }
}

void plan_attention(AttentionArgs& args, AttentionRow& row, int64_t window) {
  args.tile_tokens = tile_tokens(args.group_size);
  args.num_tiles = (args.tokens + args.tile_tokens - 1) / args.tile_tokens;
  args.num_blocks = (args.tokens + kKeyBlock - 1) / kKeyBlock;
  size_t segment = 0;
  for (int64_t block = 0; block < args.num_blocks; ++block) {
    while (row.segments[segment].end <= block * kKeyBlock) ++segment;
    row.first_segments.push_back(segment);
  }
  args.mask = {row.segments.data(),
               static_cast<int64_t>(row.segments.size()),
               row.first_segments.data(),
               row.positions.data(),
               row.first_in_runs.data(),
               row.ends_of_runs.data(),
               window};
  const std::vector<Reach> reach = reach_of_blocks(row, args);
  std::vector<std::vector<std::pair<int32_t, int32_t>>> tiles_of(args.num_blocks);
  row.tile_offsets.push_back(0);
  for (int64_t tile = 0; tile < args.num_tiles; ++tile) {
    const int64_t first = tile * args.tile_tokens, end = std::min(first + args.tile_tokens, args.tokens);
    const auto of_tile = [&](const std::vector<int32_t>& numbers) {
      return std::minmax_element(numbers.begin() + first, numbers.begin() + end);
    };
    const int64_t last_key = *of_tile(row.ends_of_runs).second, first_in_run = *of_tile(row.first_in_runs).first;
    const int64_t in_window = *of_tile(row.positions).first - window;
    for (int64_t block = 0; block * kKeyBlock < last_key; ++block) {
      // Most blocks of a long row are left out without a look at every token.
      if (reach[block].readers_end <= first) continue;
      if (reach[block].last_position <= in_window && (block + 1) * kKeyBlock <= first_in_run) continue;
      if (!attention_kernels().sees(args, tile, block)) continue;
      tiles_of[block].emplace_back(tile, row.tile_blocks.size() - row.tile_offsets.back());
      row.tile_blocks.push_back(block);
    }
    row.tile_offsets.push_back(row.tile_blocks.size());
  }
  row.block_offsets.push_back(0);
  for (const auto& tiles : tiles_of) {
    for (const auto& [tile, turn] : tiles) {
      row.block_tiles.push_back(tile);
      row.block_turns.push_back(turn);
    }
    row.block_offsets.push_back(row.block_tiles.size());
  }
  row.turns.assign(args.groups * args.num_tiles, 0);
  args.turns = row.turns.data();
  args.plan = {row.tile_offsets.data(), row.tile_blocks.data(), row.block_offsets.data(), row.block_tiles.data(),
               row.block_turns.data()};
}

}  // namespace trl_fast
