// The gradient of an embedding, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::EmbeddingArgs;

// Sums the rows of a group of places in float32, and what is there already if it is to be added to.
template <typename T>
inline void sum_group(const EmbeddingArgs& args, int64_t group, float* total, T* out) {
  const int64_t columns = args.columns, first = args.offsets[group], last = args.offsets[group + 1];
  const T* grad = static_cast<const T*>(args.grad);
  const T* row = grad + args.order[first] * columns;
  if (!args.adds && last - first == 1) {
    std::memcpy(out, row, columns * sizeof(T));
    return;
  }
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
    const Two first_row = widen_two(row + i, n);
    store_two(total + i, args.adds ? widen_two(out + i, n) + first_row : first_row);
  });
  for (int64_t place = first + 1; place < last; ++place) {
    row = grad + args.order[place] * columns;
    for_row(columns, [&](int64_t i, auto n)
                         TRL_FAST_INLINE { store_two(total + i, load_two(total + i) + widen_two(row + i, n)); });
  }
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE { narrow_two(out + i, load_two(total + i), n); });
}

void embedding_gradient(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&]<typename T>(T*) {
    const Room<float> total(args.columns);
    T* out = static_cast<T*>(args.out);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = args.tokens[group];
      if (!args.adds) {  // zeros between the token before and this one, and behind the last
        const int64_t before = group ? args.tokens[group - 1] + 1 : 0;
        std::memset(out + before * args.columns, 0, (row - before) * args.columns * sizeof(T));
        if (group + 1 == args.groups) {
          std::memset(out + (row + 1) * args.columns, 0, (args.rows - row - 1) * args.columns * sizeof(T));
        }
      }
      sum_group<T>(args, group, total.data(), out + row * args.columns);
    }
  });
}

}  // namespace
