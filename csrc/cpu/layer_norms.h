// RMSNorm of rows, forward and backward, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::NormArgs;
using trl_fast::NormCast;
using trl_fast::NormWeight;

// The factors of the normalised row in float32, in the order of T: the weight, one more for Gemma's, ones without a
// weight.
template <typename T>
class NormFactors : public Room<float> {
 public:
  explicit NormFactors(const NormWeight& weight) : Room<float>(weight.columns) {
    const float more = weight.data && weight.cast != NormCast::kGemma ? 0.0f : 1.0f;
    if (weight.data) widen_row<kByPairs<T>>(static_cast<const T*>(weight.data), weight.columns, data());
    for (int64_t i = 0; i < padded_to_two(weight.columns); ++i) data()[i] += more;
  }
};

// Sums of the gradient by a norm's weight, in the order of T.
template <typename T>
class WeightSums : public Room<float> {
 public:
  explicit WeightSums(int64_t columns) : Room<float>(columns), columns_(columns) {}
  // Writes the sums so far, and begins again.
  void write(float* to) {
    for_row(columns_, [&](int64_t i, auto n) TRL_FAST_INLINE {
      narrow_two(to + i, reordered<kByPairs<T>, false>(load_two(data() + i)), n);
    });
    std::fill(data(), data() + padded_to_two(columns_), 0.0f);
  }

 private:
  int64_t columns_;
};

inline bool rounds_first(const NormWeight& weight) { return weight.cast == NormCast::kLlama; }

// Calls a function with the C++ type of a norm's dtype, and with whether it rounds before the product with the weight.
template <typename F>
inline void with_norm(const NormWeight& weight, F f) {
  with_type(weight.dtype, [&](auto* type) {
    if (rounds_first(weight)) return f(type, std::true_type{});
    f(type, std::false_type{});
  });
}

TRL_FAST_INLINE inline float rstd_of(float squares, int64_t columns, float eps) {
  return 1.0f / std::sqrt(squares / columns + eps);
}

// The sum of squares of a row, whose numbers go to `widened` in the order of T, unless they are float32.
template <typename T>
TRL_FAST_INLINE inline float sum_of_squares(const T* x, int64_t columns, float* widened) {
  Two squares = {};
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
    const Two v = read_two(x + i, n);
    if constexpr (sizeof(T) == 2) store_two(widened + i, v);
    squares = squares + v * v;
  });
  return sum_in_pairs(squares);
}

// Writes the norm of a row x. widened: its numbers, as sum_of_squares put them there.
template <typename T, bool kRoundsFirst>
TRL_FAST_INLINE inline void norm_row(const T* x, const float* widened, const float* factors, int64_t columns,
                                     float rstd, T* out) {
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
    const Two normed = (sizeof(T) == 2 ? load_two(widened + i) : widen_two(x + i, n)) * rstd;
    narrow_two(out + i, (kRoundsFirst ? rounded<T>(normed) : normed) * load_two(factors + i), n);
  });
}

// A row on its way backward: g is the gradient by the normalised row n = x rstd, which is that by the result times the
// weight. Of 16-bit rows both are kept, in the order of T, until their mean product is known; float32 ones are cheaper
// read again.
template <typename T>
struct BackwardRow {
  const T *grad, *x;
  const float* factors;
  float rstd;
  float *g, *n;  // room for both
};

// mean(g n). With kSums the gradient by the weight is added to `sums`.
template <bool kRoundsFirst, bool kSums, typename T>
TRL_FAST_INLINE inline float mean_product(const BackwardRow<T>& row, int64_t columns, float* sums) {
  Two products = {};
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
    const Two normed = read_two(row.x + i, n) * row.rstd, by_result = read_two(row.grad + i, n);
    const Two product = by_result * load_two(row.factors + i), g = kRoundsFirst ? rounded<T>(product) : product;
    products = products + g * normed;
    if constexpr (sizeof(T) == 2) {
      store_two(row.g + i, g);
      store_two(row.n + i, normed);
    }
    if constexpr (kSums) {
      store_two(sums + i, load_two(sums + i) + by_result * (kRoundsFirst ? rounded<T>(normed) : normed));
    }
  });
  return sum_in_pairs(products) / columns;
}

// sums: null, or room for as many numbers as there are columns.
template <bool kRoundsFirst, typename T>
TRL_FAST_INLINE inline float mean_product(const BackwardRow<T>& row, int64_t columns, float* sums) {
  return sums ? mean_product<kRoundsFirst, true>(row, columns, sums)
              : mean_product<kRoundsFirst, false>(row, columns, sums);
}

// Writes the gradient by x, rstd (g - n mean(g n)). grad_sum: null, or what is added to it.
template <typename T>
TRL_FAST_INLINE inline void norm_backward_row(const BackwardRow<T>& row, int64_t columns, float mean,
                                              const T* grad_sum, T* out) {
  const auto write = [&](const auto& more) TRL_FAST_INLINE {
    for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
      Two g, normed;
      if constexpr (sizeof(T) == 2) {
        g = load_two(row.g + i), normed = load_two(row.n + i);
      } else {
        g = widen_two(row.grad + i, n) * load_two(row.factors + i), normed = widen_two(row.x + i, n) * row.rstd;
      }
      fetch_two(out + i, kAhead);
      narrow_two(out + i, more((g - normed * mean) * row.rstd, i, n), n);
    });
  };
  if (!grad_sum) return write([](Two by_x, int64_t, auto) TRL_FAST_INLINE { return by_x; });
  write([&](Two by_x, int64_t i, auto n) TRL_FAST_INLINE { return rounded<T>(by_x) + read_two(grad_sum + i, n); });
}

// Rows have two passes over their columns: first(i, n), then finish(), and second(i, n). A row's second pass and the
// next row's first run in one loop: memory is read while numbers are computed, and nothing waits for a row's sum.
template <typename Start>
TRL_FAST_INLINE inline void in_two_passes(int64_t begin, int64_t end, int64_t columns, Start start) {
  if (begin == end) return;
  auto row = start(begin);
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE { row.first(i, n); });
  row.finish(columns);
  for (int64_t r = begin + 1; r < end; ++r) {
    auto next = start(r);
    for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE {
      next.first(i, n);
      row.second(i, n);
    });
    next.finish(columns);
    row = next;
  }
  for_row(columns, [&](int64_t i, auto n) TRL_FAST_INLINE { row.second(i, n); });
}

// A row forward. kAdds: of x + residual, rounded, which is written to `sum`.
template <typename T, bool kRoundsFirst, bool kAdds>
struct ForwardRow {
  const T *x, *residual;
  const float* factors;
  float eps;
  T *sum, *out;
  float* rstd;
  Two squares = {};
  float scale = 0.0f;

  template <typename N>
  TRL_FAST_INLINE void first(int64_t i, N n) {
    Two v = read_two(x + i, n);
    if constexpr (kAdds) {
      const Two added = v + read_two(residual + i, n);
      write_two(sum + i, added, n);
      v = rounded<T>(added);
    }
    squares = squares + v * v;
  }
  TRL_FAST_INLINE void finish(int64_t columns) { scale = *rstd = rstd_of(sum_in_pairs(squares), columns, eps); }
  template <typename N>
  TRL_FAST_INLINE void second(int64_t i, N n) {
    const Two normed = widen_two((kAdds ? sum : x) + i, n) * scale;
    write_two(out + i, (kRoundsFirst ? rounded<T>(normed) : normed) * load_two(factors + i), n);
  }
};

void norm(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.weight.columns;
  with_norm(args.weight, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.weight);
    const auto run = [&]<bool kAdds>(std::bool_constant<kAdds>) {
      in_two_passes(begin, end, columns, [&](int64_t r) TRL_FAST_INLINE {
        return ForwardRow<T, kRoundsFirst, kAdds>{row_of<T>(args.x, r),
                                                  kAdds ? row_of<T>(args.residual, r) : nullptr,
                                                  factors.data(),
                                                  args.eps,
                                                  static_cast<T*>(args.sum) + r * columns,
                                                  static_cast<T*>(args.out) + r * columns,
                                                  args.rstd + r};
      });
    };
    if (args.residual.data) return run(std::true_type{});
    run(std::false_type{});
  });
}

void norm_backward(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.weight.columns;
  with_norm(args.weight, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.weight);
    const Room<float> g_row(columns), n_row(columns);
    WeightSums<T> sums(columns);
    float* added_to = args.partials ? sums.data() : nullptr;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * trl_fast::kNormBlock, args.rows);
      for (int64_t r = block * trl_fast::kNormBlock; r < last; ++r) {
        const BackwardRow<T> row = {
            row_of<T>(args.grad, r), row_of<T>(args.x, r), factors.data(), args.rstd[r], g_row.data(), n_row.data()};
        const float mean = mean_product<kRoundsFirst>(row, columns, added_to);
        if (!args.out) continue;
        const T* grad_sum = args.grad_sum.data ? row_of<T>(args.grad_sum, r) : nullptr;
        norm_backward_row(row, columns, mean, grad_sum, static_cast<T*>(args.out) + r * columns);
      }
      if (args.partials) sums.write(args.partials + block * columns);
    }
  });
}

}  // namespace
