// Declares attention over a row of token trees on the CPU, forward and backward.
//
// trl_fast/ops/attention.py specifies what is computed. Key heads are shared by groups of query heads. Each segment's
// queries are cut into tiles, all heads of a group together, its keys into blocks, from its first token on: the bits
// of a sequence do not depend on where it lies in the row, nor on what else is there. Scores of a tile and a block
// stand in the cache, and tiles and blocks of which no query sees a key are left out. Compiled once per instruction
// set, without torch headers.
#pragma once

#include <cstdint>

#include "row_types.h"

namespace trl_fast {

// Keys of a block: which of them a token sees are the bits of a word.
constexpr int64_t kKeyBlock = 64;
// Backward takes up to so many blocks together: it packs a tile's rows, and adds to the gradient of its queries, once
// for all of them. But threads share the spans of a segment and of all groups, so these are no fewer than kLeastTasks,
// if there are as many blocks.
constexpr int64_t kSpanBlocks = 4;
constexpr int64_t kLeastTasks = 8;
// A tile has about so many rows, one for each of its tokens and heads of the group.
constexpr int64_t kAimedRows = 96;
// Rows are multiplied in strips of at most so many.
constexpr int64_t kMostStripRows = 8;
// Packed keys of a block have room for whole panels of at most so many.
constexpr int64_t kMostPanelKeys = 32;

// (heads, T, D), contiguous in D.
struct AttentionHeads {
  void* data;
  int64_t head_stride, token_stride;
};

// Which tokens see which: a token sees, of its own segment and of those that this one continues, what is behind its
// first_in_run or among its last `window` tokens, and before its end_of_run.
struct AttentionMask {
  const int32_t* positions;      // (T,) of tokens in their sequences
  const int32_t* first_in_runs;  // (T,)
  const int32_t* ends_of_runs;   // (T,)
  int64_t window;
};

// Tokens of one segment whose queries are computed together.
struct QueryTile {
  int32_t first, tokens;
};

// At most kKeyBlock tokens of one segment whose keys are computed together; origin: where in the row the token at
// position 0 would stand, if the whole sequence were there; place: where the block's packed keys begin.
struct KeyBlock {
  int32_t first, tokens, origin, place;
};

// Up to kSpanBlocks blocks of one segment, one after the other.
struct KeySpan {
  int32_t first_block, num_blocks;
};

// Which tiles see keys of which blocks: none but those of their own segment and of those that this one continues.
// Blocks of tile i: tile_blocks[tile_offsets[i]], ..., in ascending order. Tiles of span i:
// span_tiles[span_offsets[i]], ..., and which one of the tile's spans it is, span_turns.
struct AttentionPlan {
  const QueryTile* tiles;
  const KeyBlock* blocks;
  const int64_t* tile_offsets;
  const int32_t* tile_blocks;
  const KeySpan* spans;
  const int64_t* span_offsets;
  const int32_t* span_tiles;
  const int32_t* span_turns;
};

struct AttentionArgs {
  Dtype dtype;  // of heads, but for grad_query
  int64_t tokens, groups, group_size, width, value_width;
  int64_t tile_tokens, num_tiles, num_blocks, num_spans;  // tile_tokens: of the largest tiles
  int64_t key_places;                                     // of a group's packed keys
  float scale;
  float softcap;  // scores are softcap * tanh(scores / softcap); 0: as they are
  AttentionMask mask;
  AttentionPlan plan;
  AttentionHeads query, key, value, out;
  float* lse;  // (heads, T), natural
  // Forward: room for packed_keys_size(args) and packed_values_size(args) floats.
  float* packed_keys;
  float* packed_values;
  // Backward.
  AttentionHeads grad, grad_key, grad_value;
  AttentionHeads grad_query;  // float32, zeros before
  float* deltas;              // (heads, T): sum of gradient times output
  int32_t* turns;             // (groups, num_tiles), zeros before: how many spans have added to a tile's gradient
};

struct AttentionKernels {
  int64_t (*forward_scratch)(const AttentionArgs&);  // floats
  int64_t (*backward_scratch)(const AttentionArgs&);
  int64_t (*packed_keys_size)(const AttentionArgs&);
  int64_t (*packed_values_size)(const AttentionArgs&);
  void (*pack)(const AttentionArgs&, int64_t begin, int64_t end);              // groups x blocks
  void (*forward)(const AttentionArgs&, int64_t task, float* scratch);         // tiles x groups, the longest first
  void (*prepare_backward)(const AttentionArgs&, int64_t begin, int64_t end);  // tokens
  // Spans x groups. A task waits for tasks of smaller numbers, so they must be begun in order.
  void (*backward)(const AttentionArgs&, int64_t task, float* scratch);
};

// The kernels of the instruction set that row_kernels() has.
const AttentionKernels& attention_kernels();

}  // namespace trl_fast
