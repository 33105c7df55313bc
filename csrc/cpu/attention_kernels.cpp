// Attention over a row of token trees, for one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// Forward is the online softmax of FlashAttention (arXiv 2205.14135, algorithm 1). Backward computes the weights again
// from the log-sum-exp: five products a tile and block, of which those for keys and values are summed over the tiles
// of a block, and that for queries over the blocks of a span, which is added to the gradient span after span.
#include "attention_kernels.h"

#include "attention_tiles.h"

namespace {

using trl_fast::Dtype;
using trl_fast::kSpanBlocks;

// A row's scores are taken relative to a number that is at most so much below their top: it rarely has to be changed,
// and no weight overflows.
constexpr float kSlack = 6.0f;
// Below every score: exponents are never the difference of two infinities.
constexpr float kLowest = -1e38f;

// ---- packing

int64_t packed_keys_size(const AttentionArgs& args) { return args.groups * args.key_places * args.width; }

int64_t packed_values_size(const AttentionArgs& args) {
  return args.groups * args.tokens * whole_panels(args.value_width);
}

float* packed_keys(const AttentionArgs& args, int64_t group, const KeyBlock& block) {
  return args.packed_keys + (group * args.key_places + block.place) * args.width;
}

float* packed_values(const AttentionArgs& args, int64_t group, const KeyBlock& block) {
  return args.packed_values + (group * args.tokens + block.first) * whole_panels(args.value_width);
}

template <typename T>
void pack(const AttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t group = n / args.num_blocks;
    const KeyBlock& block = args.plan.blocks[n % args.num_blocks];
    pack_block<true, T>(args.key, group, block, args.width, packed_keys(args, group, block));
    pack_block<false, T>(args.value, group, block, args.value_width, packed_values(args, group, block));
  }
}

// ---- forward

// Rows of a tile while it goes over its blocks.
struct Softmax {
  float* query;   // (rows, padded width), times the scale
  float* out;     // (rows, columns), relative to e^top
  float* tops;    // (rows,) what exponents are relative to
  float* sums;    // (rows, kWidth) of weights
  float* scores;  // (kStrip, kKeyBlock)
  Seen* seen;     // of each strip
  int64_t columns;
};

Softmax forward_room(const AttentionArgs& args, Room& room) {
  const int64_t rows = most_rows(args);
  Softmax s;
  s.columns = whole_panels(args.value_width);
  s.query = room.take(rows * padded(args.width));
  s.out = room.take(rows * s.columns);
  s.tops = room.take(rows);
  s.sums = room.take(rows * kWidth);
  s.scores = room.take(kStrip * kKeyBlock);
  s.seen = take_seen(room, rows);
  return s;
}

// Raises the tops of a strip's rows to their largest score.
void raise_tops(const Softmax& state, int64_t row, const Seen& seen, Columns at) {
  for (int64_t r = 0; r < seen.rows; ++r) {
    Vec largest = splat(kLowest);
    for (int64_t i = at.begin; i < at.end; i += kWidth) {
      largest = maximum(load(state.scores + r * kKeyBlock + i), largest);
    }
    float& top = state.tops[row + r];
    const float raised = max_of(largest);
    if (!(raised > top)) continue;
    const Vec factor = weight_vec(splat(top - raised));
    const bool is_first = top == kLowest;
    top = raised;
    if (is_first) continue;  // all sums are 0
    float* const sums = state.sums + (row + r) * kWidth;
    store(sums, load(sums) * factor);
    float* const out = state.out + (row + r) * state.columns;
    for (int64_t i = 0; i < state.columns; i += kWidth) store(out + i, load(out + i) * factor);
  }
}

// Puts caps on a strip's scores.
void cap(const AttentionArgs& args, float* scores, const Seen& seen, Columns at) {
  const Vec inner = splat(1.0f / args.softcap), softcap = splat(args.softcap);
  for (int64_t r = 0; r < seen.rows; ++r) {
    for (int64_t i = at.begin; i < at.end; i += kWidth) {
      float* const x = scores + r * kKeyBlock + i;
      store(x, tanh_vec(load(x) * inner).value * softcap);
    }
  }
}

// Turns a strip's scores into weights relative to its tops, and adds them up.
void compute_weights(const Softmax& state, int64_t row, const Seen& seen, Columns at) {
  Vec excess = splat(kLowest);
  for (int64_t r = 0; r < seen.rows; ++r) {
    float* const scores = state.scores + r * kKeyBlock;
    Vec largest = splat(-kInf);
    for (int64_t i = at.begin; i < at.end; i += kWidth) {
      Vec x = load(scores + i);
      if (seen.all != ~uint64_t{0}) store(scores + i, x = only_seen(x, seen.by_row[r], i, -kInf));
      largest = maximum(x, largest);
    }
    excess = maximum(largest - splat(state.tops[row + r]), excess);
  }
  if (max_of(excess) > kSlack) raise_tops(state, row, seen, at);
  for (int64_t r = 0; r < seen.rows; ++r) {
    float* const scores = state.scores + r * kKeyBlock;
    const Vec top = splat(state.tops[row + r]);
    Vec sums[2] = {load(state.sums + (row + r) * kWidth), Vec{}};
    for_vectors(at.end - at.begin, [&](int64_t i, int k) {
      const Vec weights = weight_vec(load(scores + at.begin + i) - top);
      store(scores + at.begin + i, weights);
      sums[k] += weights;
    });
    store(state.sums + (row + r) * kWidth, sums[0] + sums[1]);
  }
}

void attend_block(const AttentionArgs& args, const Softmax& state, const Tile& tile, int64_t group,
                  const KeyBlock& block) {
  const int64_t stride = padded(args.width);
  const float* keys = packed_keys(args, group, block);
  const float* values = packed_values(args, group, block);
  for (int64_t row = 0; row < tile.whole_rows; row += kStrip) {
    const Seen& seen = state.seen[row / kStrip];
    if (!seen.any) continue;
    const Columns at(seen);
    multiply_strip<false>(seen.rows, PlainLeft{state.query + row * stride, stride}, keys + at.begin * args.width,
                          kPanelColumns * args.width, args.width, at.end - at.begin, state.scores + at.begin,
                          kKeyBlock);
    if (args.softcap) cap(args, state.scores, seen, at);
    compute_weights(state, row, seen, at);
    multiply_strip<true>(seen.rows, PlainLeft{state.scores + seen.begin(), kKeyBlock},
                         values + seen.begin() * kPanelColumns, block.tokens * kPanelColumns,
                         seen.end() - seen.begin(), state.columns, state.out + row * state.columns, state.columns);
  }
}

template <typename T>
void forward(const AttentionArgs& args, int64_t task, float* scratch) {
  const int64_t group = task % args.groups, index = args.num_tiles - 1 - task / args.groups;
  const Tile tile = tile_of(args, index);
  Room room{scratch};
  const Softmax state = forward_room(args, room);
  gather<T>(args, args.query, group, tile, args.width, args.scale, padded(args.width), state.query);
  std::fill(state.out, state.out + tile.whole_rows * state.columns, 0.0f);
  std::fill(state.sums, state.sums + tile.whole_rows * kWidth, 0.0f);
  std::fill(state.tops, state.tops + tile.whole_rows, kLowest);
  for (int64_t n = args.plan.tile_offsets[index]; n < args.plan.tile_offsets[index + 1]; ++n) {
    const KeyBlock& block = args.plan.blocks[args.plan.tile_blocks[n]];
    look(args, tile, block, state.seen);
    attend_block(args, state, tile, group, block);
  }
  for_rows(args, group, tile, [&](int64_t row, int64_t head, int64_t token) {
    const float sum = static_cast<float>(sum_of(load(state.sums + row * kWidth)));
    args.lse[head * args.tokens + token] = state.tops[row] + std::log(sum);
    const Vec share = splat(1.0f / sum);
    float* const out = state.out + row * state.columns;
    for (int64_t i = 0; i < state.columns; i += kWidth) store(out + i, load(out + i) * share);
    narrow_chunk(out, args.value_width, row_of<T>(args.out, head, token));
  });
}

// ---- backward

// Sums gradient times output of each row channel after channel, as tiles of products do: a token that sees one key has
// that one's value as output, and the gradient of its score is exactly 0.
template <typename T>
void prepare_backward(const AttentionArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kSteps = 64;
  float grads[kSteps * kWidth], outs[kSteps * kWidth];
  for (int64_t head = 0; head < args.groups * args.group_size; ++head) {
    for (int64_t token = begin; token < end; token += kWidth) {
      const int64_t lanes = std::min<int64_t>(kWidth, end - token);
      Vec sums = {};
      for (int64_t channel = 0; channel < args.value_width; channel += kSteps) {
        const int64_t steps = std::min(kSteps, args.value_width - channel);
        const auto pack = [&](const AttentionHeads& heads, float* to) {
          const T* const from = row_of<const T>(heads, head, token) + channel;
          pack_lanes(Factor<T>{from, heads.token_stride, 1, lanes, steps}, kWidth, to);
        };
        pack(args.grad, grads);
        pack(args.out, outs);
        for (int64_t i = 0; i < steps * kWidth; i += kWidth) sums += load(grads + i) * load(outs + i);
      }
      narrow_part(sums, lanes, args.deltas + head * args.tokens + token);
    }
  }
}

// What one block of keys needs.
struct BlockAtWork {
  float* keys;           // right factors: tokens as columns,
  float* values;         //
  float* keys_as_steps;  // and as steps
  float* grad_key;       // (kKeyBlock, key_columns)
  float* grad_value;     // (kKeyBlock, value_columns)
};

// What the blocks of a span need, and the tile at work.
struct Backward {
  BlockAtWork blocks[kSpanBlocks];
  float* query;        // (rows, key_columns), times the scale
  float* grad;         // (rows, value_columns)
  float* weights;      // (rows, kKeyBlock)
  float* grad_scores;  // (rows, kKeyBlock)
  TileGradients gradients;
  int64_t key_columns, value_columns;
};

Backward backward_room(const AttentionArgs& args, Room& room) {
  const int64_t rows = most_rows(args);
  Backward b;
  b.key_columns = whole_panels(args.width);
  b.value_columns = whole_panels(args.value_width);
  for (BlockAtWork& block : b.blocks) {
    block.keys = room.take(kKeyBlock * args.width);
    block.values = room.take(kKeyBlock * args.value_width);
    block.keys_as_steps = room.take(kKeyBlock * b.key_columns);
    block.grad_key = room.take(kKeyBlock * b.key_columns);
    block.grad_value = room.take(kKeyBlock * b.value_columns);
  }
  b.query = room.take(rows * b.key_columns);
  b.grad = room.take(rows * b.value_columns);
  b.weights = room.take(rows * kKeyBlock);
  b.grad_scores = room.take(rows * kKeyBlock);
  b.gradients = tile_gradients_room(room, rows, b.key_columns);
  return b;
}

template <typename T>
void begin_block(const AttentionArgs& args, int64_t group, const KeyBlock& block, const Backward& b,
                 const BlockAtWork& at_work) {
  pack_block<true, T>(args.key, group, block, args.width, at_work.keys);
  pack_block<true, T>(args.value, group, block, args.value_width, at_work.values);
  pack_block<false, T>(args.key, group, block, args.width, at_work.keys_as_steps);
  const int64_t rows = (block.tokens + kStrip - 1) / kStrip * kStrip;
  std::fill(at_work.grad_key, at_work.grad_key + rows * b.key_columns, 0.0f);
  std::fill(at_work.grad_value, at_work.grad_value + rows * b.value_columns, 0.0f);
}

template <typename T>
void end_block(const AttentionArgs& args, int64_t group, const KeyBlock& block, const Backward& b,
               const BlockAtWork& at_work) {
  for (int64_t key = 0; key < block.tokens; ++key) {
    const int64_t token = block.first + key;
    narrow_chunk(at_work.grad_key + key * b.key_columns, args.width, row_of<T>(args.grad_key, group, token));
    narrow_chunk(at_work.grad_value + key * b.value_columns, args.value_width,
                 row_of<T>(args.grad_value, group, token));
  }
}

template <typename T>
void load_tile(const AttentionArgs& args, const Backward& b, const Tile& tile, int64_t group) {
  gather<T>(args, args.query, group, tile, args.width, args.scale, b.key_columns, b.query);
  gather<T>(args, args.grad, group, tile, args.value_width, 1.0f, b.value_columns, b.grad);
  begin_tile(args, group, tile, tile.whole_rows, 1.0f, b.gradients);
}

// Scores from products of scaled queries and keys; and the derivative of capped scores, if there is a cap.
template <bool kCapped>
inline Vec scores_of(const AttentionArgs& args, Vec products, Vec* derivative) {
  if constexpr (!kCapped) return products;
  const Tanh tanh = tanh_vec(products * splat(1.0f / args.softcap));
  *derivative = tanh.derivative;
  return tanh.value * splat(args.softcap);
}

// Computes a strip's weights and the gradient of its scores from the products that stand there.
template <bool kCapped>
void differentiate(const AttentionArgs& args, const Backward& b, int64_t row, const Seen& seen, Columns at) {
  for (int64_t r = row; r < row + seen.rows; ++r) {
    float* const weights = b.weights + r * kKeyBlock;
    float* const grad_scores = b.grad_scores + r * kKeyBlock;
    const Vec lse = splat(b.gradients.lse[r]), delta = splat(b.gradients.deltas[r]);
    for (int64_t i = at.begin; i < at.end; i += kWidth) {
      Vec derivative = splat(1.0f);
      Vec w = weight_vec(scores_of<kCapped>(args, load(weights + i), &derivative) - lse);
      if (seen.all != ~uint64_t{0}) w = only_seen(w, seen.by_row[r - row], i, 0.0f);
      store(weights + i, w);
      const Vec by_score = w * (load(grad_scores + i) - delta);
      store(grad_scores + i, kCapped ? by_score * derivative : by_score);
    }
  }
}

// Computes weights (rows, kKeyBlock) of a tile and the gradient of its scores, zeros where nothing is seen.
void compute_tile_weights(const AttentionArgs& args, const Backward& b, const Tile& tile, const BlockAtWork& block) {
  for (int64_t row = 0; row < tile.rows; row += kStrip) {
    const Seen& seen = b.gradients.seen[row / kStrip];
    float* const weights = b.weights + row * kKeyBlock;
    float* const grad_scores = b.grad_scores + row * kKeyBlock;
    if (seen.all != ~uint64_t{0}) {
      std::fill(weights, weights + kStrip * kKeyBlock, 0.0f);
      std::fill(grad_scores, grad_scores + kStrip * kKeyBlock, 0.0f);
    }
    if (!seen.any) continue;
    const Columns at(seen);
    const int64_t size = at.end - at.begin;
    multiply_strip<false>(seen.rows, PlainLeft{b.query + row * b.key_columns, b.key_columns},
                          block.keys + at.begin * args.width, kPanelColumns * args.width, args.width, size,
                          weights + at.begin, kKeyBlock);
    multiply_strip<false>(seen.rows, PlainLeft{b.grad + row * b.value_columns, b.value_columns},
                          block.values + at.begin * args.value_width, kPanelColumns * args.value_width,
                          args.value_width, size, grad_scores + at.begin, kKeyBlock);
    (args.softcap ? differentiate<true> : differentiate<false>)(args, b, row, seen, at);
  }
}

// Adds a tile's share of the gradients of a block's keys and values.
void add_to_keys(const Backward& b, const Tile& tile, const KeyBlock& block, const BlockAtWork& at_work) {
  for (int64_t key = 0; key < block.tokens; key += kStrip) {
    const uint64_t keys = ((uint64_t{1} << kStrip) - 1) << key;
    const int64_t rows = std::min(kStrip, block.tokens - key);
    int64_t begin = 0, end = tile.whole_rows;
    while (begin < end && !(b.gradients.seen[begin / kStrip].any & keys)) begin += kStrip;
    while (begin < end && !(b.gradients.seen[end / kStrip - 1].any & keys)) end -= kStrip;
    if (begin == end) continue;
    const int64_t steps = std::min(end, tile.rows) - begin, from = begin * kKeyBlock + key;
    add_product(rows, TransposedLeft{b.weights + from, kKeyBlock}, b.grad + begin * b.value_columns, b.value_columns,
                steps, b.value_columns, at_work.grad_value + key * b.value_columns, b.value_columns);
    add_product(rows, TransposedLeft{b.grad_scores + from, kKeyBlock}, b.query + begin * b.key_columns, b.key_columns,
                steps, b.key_columns, at_work.grad_key + key * b.key_columns, b.key_columns);
  }
}

// Adds a block's share of the gradient of a tile's queries.
void add_to_queries(const Backward& b, const Tile& tile, const KeyBlock& block, const BlockAtWork& at_work) {
  for (int64_t row = 0; row < tile.rows; row += kStrip) {
    const Seen& seen = b.gradients.seen[row / kStrip];
    if (!seen.any) continue;
    multiply_strip<true>(seen.rows, PlainLeft{b.grad_scores + row * kKeyBlock + seen.begin(), kKeyBlock},
                         at_work.keys_as_steps + seen.begin() * kPanelColumns, block.tokens * kPanelColumns,
                         seen.end() - seen.begin(), b.key_columns, b.gradients.query + row * b.key_columns,
                         b.key_columns);
  }
}

template <typename T>
void backward(const AttentionArgs& args, int64_t task, float* scratch) {
  Room room{scratch};
  const Backward b = backward_room(args, room);
  for_span(
      args, task, b.gradients,
      [&](int64_t group, const KeyBlock& block, int64_t n) { begin_block<T>(args, group, block, b, b.blocks[n]); },
      [&](int64_t group, const Tile& tile) { load_tile<T>(args, b, tile, group); },
      [&](const Tile& tile, const KeyBlock& block, int64_t n) {
        compute_tile_weights(args, b, tile, b.blocks[n]);
        add_to_keys(b, tile, block, b.blocks[n]);
        add_to_queries(b, tile, block, b.blocks[n]);
      },
      [&](int64_t group, const KeyBlock& block, int64_t n) { end_block<T>(args, group, block, b, b.blocks[n]); });
}

// One of three functions by the dtype of `args`.
template <auto kFloat, auto kBFloat16, auto kFloat16, typename... Rest>
void by_dtype(const AttentionArgs& args, Rest... rest) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return kFloat(args, rest...);
    case Dtype::kBFloat16:
      return kBFloat16(args, rest...);
    case Dtype::kFloat16:
      return kFloat16(args, rest...);
  }
}

}  // namespace

namespace trl_fast {

extern const AttentionKernels TRL_FAST_JOIN(kAttentionKernels, CPU_CAPABILITY);
const AttentionKernels TRL_FAST_JOIN(kAttentionKernels, CPU_CAPABILITY) = {
    scratch_of<forward_room>,
    scratch_of<backward_room>,
    packed_keys_size,
    packed_values_size,
    by_dtype<pack<float>, pack<BFloat16>, pack<Float16>>,
    by_dtype<forward<float>, forward<BFloat16>, forward<Float16>>,
    by_dtype<prepare_backward<float>, prepare_backward<BFloat16>, prepare_backward<Float16>>,
    by_dtype<backward<float>, backward<BFloat16>, backward<Float16>>,
};

}  // namespace trl_fast
