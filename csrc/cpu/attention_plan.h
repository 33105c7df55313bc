// Plans attention over a row of token trees: which tiles of queries see which blocks of keys.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_kernels.h"

namespace trl_fast {

// Tokens [start, end) of a row, seen by themselves and by all that continues them, which ends at tree_end; offset:
// the position of `start` in its sequence.
struct TreeSegment {
  int64_t start, end, tree_end, offset;
};

// A row of tokens, and what AttentionMask and AttentionPlan point into.
struct AttentionRow {
  std::vector<TreeSegment> segments;  // that have tokens, in order
  std::vector<int32_t> positions, first_in_runs, ends_of_runs;
  std::vector<QueryTile> tiles;
  std::vector<KeyBlock> blocks;
  std::vector<KeySpan> spans;
  std::vector<int32_t> tile_blocks, span_tiles, span_turns, turns;
  std::vector<int64_t> tile_offsets, span_offsets;  // pairs of a tile and a block: a million tokens may have 2^31

  // segments: start, end, tree_end, offset of each; runs: start and end of each, in tokens of the row. Throws
  // std::invalid_argument if they are not those of a row of so many tokens.
  AttentionRow(const int64_t* segment_numbers, int64_t num_segments, const int64_t* run_numbers, int64_t num_runs,
               bool whole_runs, int64_t tokens);
};

// Completes the arguments of a row whose tokens, groups and group_size are set: tiles, blocks, mask and plan.
void plan_attention(AttentionArgs& args, AttentionRow& row, int64_t window);

}  // namespace trl_fast
