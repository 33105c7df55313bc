// The gradient of an embedding, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::EmbeddingArgs;

// Writes zeros to rows. A memset would wait for each line of memory.
template <typename T>
inline void clear_rows(T* rows, int64_t count, int64_t columns) {
  for_row(count * columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
    fetch_two(rows + i, kAhead);
    narrow_two(rows + i, Two{}, n);
  });
}

// Sums the rows of a group of places in float32, and what is there already if it is to be added to. Rows lie anywhere:
// those of later places are fetched meanwhile.
template <typename T>
inline void sum_group(const EmbeddingArgs& args, int64_t group, float* total, T* out) {
  const int64_t columns = args.columns, first = args.offsets[group], last = args.offsets[group + 1];
  const int64_t places = args.offsets[args.groups], places_ahead = kAhead / (columns * sizeof(T) + 1) + 1;
  const auto for_row_of = [&](int64_t place, auto f) TRL_FAST_INLINE {
    const auto row_at = [&](int64_t p) { return static_cast<const T*>(args.grad) + args.order[p] * columns; };
    const T *row = row_at(place), *later = row_at(std::min(place + places_ahead, places - 1));
    for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
      fetch_two(later + i, 0);
      f(row + i, i, n);
    });
  };
  if (!args.adds && last - first == 1) {
    return for_row_of(first, [&](const T* row, int64_t i, auto n) TRL_FAST_INLINE {
      fetch_two(out + i, kAhead);
      copy_two(row, out + i, n);
    });
  }
  for_row_of(first, [&](const T* row, int64_t i, auto n) TRL_FAST_INLINE {
    const Two first_row = widen_two(row, n);
    store_two(total + i, args.adds ? widen_two(out + i, n) + first_row : first_row);
  });
  for (int64_t place = first + 1; place < last; ++place) {
    for_row_of(place, [&](const T* row, int64_t i, auto n)
                          TRL_FAST_INLINE { store_two(total + i, load_two(total + i) + widen_two(row, n)); });
  }
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE { write_two(out + i, load_two(total + i), n); });
}

void embedding_gradient(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&]<typename T>(T*) {
    const Room<float> total(args.columns);
    T* out = static_cast<T*>(args.out);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = args.tokens[group];
      if (!args.adds) {  // zeros between the token before and this one, and behind the last
        const int64_t before = group ? args.tokens[group - 1] + 1 : 0;
        clear_rows(out + before * args.columns, row - before, args.columns);
        if (group + 1 == args.groups) {
          clear_rows(out + (row + 1) * args.columns, args.rows - row - 1, args.columns);
        }
      }
      sum_group<T>(args, group, total.data(), out + row * args.columns);
    }
  });
}

}  // namespace
