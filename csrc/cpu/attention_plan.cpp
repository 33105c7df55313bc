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

// Cuts segments into blocks; returns the first block of each, and the number of all.
std::vector<int64_t> cut_blocks(AttentionRow& row, int64_t& key_places) {
  std::vector<int64_t> first_blocks;
  for (const TreeSegment& s : row.segments) {
    first_blocks.push_back(row.blocks.size());
    for (int64_t first = s.start; first < s.end; first += kKeyBlock) {
      const int64_t tokens = std::min(kKeyBlock, s.end - first);
      row.blocks.push_back({static_cast<int32_t>(first), static_cast<int32_t>(tokens),
                            static_cast<int32_t>(s.start - s.offset), static_cast<int32_t>(key_places)});
      key_places += (tokens + kMostPanelKeys - 1) / kMostPanelKeys * kMostPanelKeys;
    }
  }
  first_blocks.push_back(row.blocks.size());
  return first_blocks;
}

// How far the tokens of a tile see: keys before `last_key`, and of those what is behind a position or a token.
struct Sight {
  int64_t last_key, position, first_in_run;

  Sight(const AttentionRow& row, const QueryTile& tile, int64_t window) {
    const auto of_tile = [&](const std::vector<int32_t>& numbers) {
      const auto begin = numbers.begin() + tile.first;
      return std::minmax_element(begin, begin + tile.tokens);
    };
    last_key = *of_tile(row.ends_of_runs).second;
    position = row.positions[tile.first] - window;
    first_in_run = *of_tile(row.first_in_runs).first;
  }

  bool reaches(const KeyBlock& block) const {
    const int64_t end = block.first + block.tokens;
    return block.first < last_key && (end - 1 - block.origin > position || end > first_in_run);
  }
};

// Cuts segments into tiles, each with the blocks that it sees.
void cut_tiles(const AttentionArgs& args, AttentionRow& row, const std::vector<int64_t>& first_blocks) {
  std::vector<size_t> sequence;  // the segments that one continues, and itself
  row.tile_offsets.push_back(0);
  for (size_t n = 0; n < row.segments.size(); ++n) {
    const TreeSegment& s = row.segments[n];
    while (!sequence.empty() && row.segments[sequence.back()].tree_end <= s.start) sequence.pop_back();
    sequence.push_back(n);
    for (int64_t first = s.start; first < s.end; first += args.tile_tokens) {
      const int64_t tokens = std::min(args.tile_tokens, s.end - first);
      row.tiles.push_back({static_cast<int32_t>(first), static_cast<int32_t>(tokens)});
      const Sight sight(row, row.tiles.back(), args.mask.window);
      for (const size_t segment : sequence) {
        for (int64_t block = first_blocks[segment]; block < first_blocks[segment + 1]; ++block) {
          if (sight.reaches(row.blocks[block])) row.tile_blocks.push_back(block);
        }
      }
      row.tile_offsets.push_back(row.tile_blocks.size());
    }
  }
}

// Puts the blocks of each segment together to spans; returns the span of each block.
std::vector<int32_t> cut_spans(AttentionRow& row, int64_t groups, const std::vector<int64_t>& first_blocks) {
  const int64_t least = std::max<int64_t>(1, kLeastTasks / groups);
  std::vector<int32_t> span_of(row.blocks.size());
  for (size_t n = 0; n < row.segments.size(); ++n) {
    const int64_t most = std::clamp((first_blocks[n + 1] - first_blocks[n]) / least, int64_t{1}, kSpanBlocks);
    for (int64_t first = first_blocks[n]; first < first_blocks[n + 1]; first += most) {
      const int64_t blocks = std::min(most, first_blocks[n + 1] - first);
      std::fill_n(span_of.begin() + first, blocks, row.spans.size());
      row.spans.push_back({static_cast<int32_t>(first), static_cast<int32_t>(blocks)});
    }
  }
  return span_of;
}

// Lists the tiles of each span.
void turn_around(AttentionRow& row, const std::vector<int32_t>& span_of) {
  std::vector<std::vector<std::pair<int32_t, int32_t>>> tiles_of(row.spans.size());
  for (size_t tile = 0; tile < row.tiles.size(); ++tile) {
    int32_t last = -1, turn = 0;
    for (int64_t n = row.tile_offsets[tile]; n < row.tile_offsets[tile + 1]; ++n) {
      const int32_t span = span_of[row.tile_blocks[n]];
      if (span != last) tiles_of[span].emplace_back(tile, turn++);
      last = span;
    }
  }
  row.span_offsets.push_back(0);
  for (const auto& tiles : tiles_of) {
    for (const auto& [tile, turn] : tiles) {
      row.span_tiles.push_back(tile);
      row.span_turns.push_back(turn);
    }
    row.span_offsets.push_back(row.span_tiles.size());
  }
}

}  // namespace

AttentionRow::AttentionRow(const int64_t* segment_numbers, int64_t num_segments, const int64_t* run_numbers,
                           int64_t num_runs, bool whole_runs, int64_t tokens)
    : first_in_runs(tokens), ends_of_runs(tokens) {
  int64_t next = 0;
  std::vector<int64_t> tree_ends;  // of the segments that the next one may continue
  for (int64_t n = 0; n < num_segments; ++n) {
    const int64_t* const given = segment_numbers + 4 * n;
    const TreeSegment s = {given[0], given[1], given[2], given[3]};
    if (s.start != next || s.end < s.start || s.tree_end < s.end || s.tree_end > tokens) {
      throw std::invalid_argument("segments: number " + std::to_string(n) + " does not stand behind the one before");
    }
    if (s.offset < 0 || s.offset > s.start) {
      throw std::invalid_argument("segments: number " + std::to_string(n) + " has " + std::to_string(s.offset) +
                                  " tokens of its sequence before it, the row has " + std::to_string(s.start));
    }
    while (!tree_ends.empty() && tree_ends.back() <= s.start) tree_ends.pop_back();
    if (!tree_ends.empty() && s.tree_end > tree_ends.back()) {
      throw std::invalid_argument("segments: number " + std::to_string(n) + " ends behind one that it continues");
    }
    tree_ends.push_back(s.tree_end);
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
  int64_t last_end = 0;
  for (int64_t n = 0; n < num_runs; ++n) {
    const int64_t start = run_numbers[2 * n], end = run_numbers[2 * n + 1];
    if (start < 0 || end > tokens)
      throw std::invalid_argument("runs: number " + std::to_string(n) + " leaves the row");
    if (start < last_end)
      throw std::invalid_argument("runs: number " + std::to_string(n) + " begins before the end of the one before");
    last_end = std::max(start, end);
    for (int64_t t = start; t < end; ++t) {
      if (whole_runs) first_in_runs[t] = start;
      ends_of_runs[t] = end;
    }
  }
}

void plan_attention(AttentionArgs& args, AttentionRow& row, int64_t window) {
  args.mask = {row.positions.data(), row.first_in_runs.data(), row.ends_of_runs.data(), window};
  args.tile_tokens = tile_tokens(args.group_size);
  args.key_places = 0;
  const std::vector<int64_t> first_blocks = cut_blocks(row, args.key_places);
  cut_tiles(args, row, first_blocks);
  turn_around(row, cut_spans(row, args.groups, first_blocks));
  args.num_tiles = row.tiles.size();
  args.num_blocks = row.blocks.size();
  args.num_spans = row.spans.size();
  row.turns.assign(args.groups * args.num_tiles, 0);
  args.turns = row.turns.data();
  args.plan = {row.tiles.data(), row.blocks.data(),       row.tile_offsets.data(), row.tile_blocks.data(),
               row.spans.data(), row.span_offsets.data(), row.span_tiles.data(),   row.span_turns.data()};
}

}  // namespace trl_fast
