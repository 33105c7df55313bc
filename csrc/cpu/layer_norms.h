// RMSNorm of rows, forward and backward, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::NormArgs;
using trl_fast::NormCast;
using trl_fast::NormWeight;

// The factors of the normalised row in float32: the weight, one more for Gemma's, ones without a weight.
template <typename T>
class NormFactors : public Room<float> {
 public:
  explicit NormFactors(const NormWeight& weight) : Room<float>(weight.columns) {
    const float more = weight.data && weight.cast != NormCast::kGemma ? 0.0f : 1.0f;
    if (weight.data) widen_chunk(static_cast<const T*>(weight.data), weight.columns, 0.0f, data());
    for (int64_t i = 0; i < weight.columns; ++i) data()[i] += more;
  }
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

// Writes x + residual, rounded.
template <typename T>
inline void add_row(const T* x, const T* residual, int64_t columns, T* sum) {
  for_row(columns, [&](int64_t i, int, auto n) TRL_FAST_INLINE {
    narrow_part(widen_part(x + i, n) + widen_part(residual + i, n), n, sum + i);
  });
}

// 1 / sqrt(mean of squares + eps) of a row.
template <typename T>
inline float row_rstd(const T* x, int64_t columns, float eps) {
  Vec squares[2] = {};
  for_row(columns, [&](int64_t i, int k, auto n) TRL_FAST_INLINE {
    const Vec v = widen_part(x + i, n);
    squares[k] += v * v;
  });
  return 1.0f / std::sqrt(sum_in_pairs(squares[0] + squares[1]) / columns + eps);
}

// Writes the norm of a row.
template <typename T, bool kRoundsFirst>
inline void norm_row(const T* x, const float* factors, int64_t columns, float rstd, T* out) {
  for_row(columns, [&](int64_t i, int, auto n) TRL_FAST_INLINE {
    const Vec normed = widen_part(x + i, n) * splat(rstd);
    narrow_part((kRoundsFirst ? rounded<T>(normed) : normed) * load(factors + i), n, out + i);
  });
}

// The gradient by the normalised row: that by the result, times the weight.
template <typename T, bool kRoundsFirst>
inline Vec by_normed(Vec grad, const float* factors) {
  const Vec product = grad * load(factors);
  return kRoundsFirst ? rounded<T>(product) : product;
}

// mean(g n), g being the gradient by the normalised row n = x rstd. partial: null, or where the gradient by the weight
// is added.
template <typename T, bool kRoundsFirst>
inline float mean_product(const T* grad, const T* x, const float* factors, int64_t columns, float rstd,
                          float* partial) {
  Vec products[2] = {};
  for_row(columns, [&](int64_t i, int k, auto n) TRL_FAST_INLINE {
    const Vec normed = widen_part(x + i, n) * splat(rstd), g = widen_part(grad + i, n);
    products[k] += by_normed<T, kRoundsFirst>(g, factors + i) * normed;
    if (partial) {
      const Vec by_weight = g * (kRoundsFirst ? rounded<T>(normed) : normed);
      narrow_part(widen_part(partial + i, n) + by_weight, n, partial + i);
    }
  });
  return sum_in_pairs(products[0] + products[1]) / columns;
}

// Writes the gradient by x, rstd (g - n mean(g n)). grad_sum: null, or what is added to it.
template <typename T, bool kRoundsFirst>
inline void norm_backward_row(const T* grad, const T* x, const float* factors, int64_t columns, float rstd, float mean,
                              const T* grad_sum, T* out) {
  const auto write = [&](const auto& more) {
    for_row(columns, [&](int64_t i, int, auto n) TRL_FAST_INLINE {
      const Vec normed = widen_part(x + i, n) * splat(rstd);
      const Vec g = by_normed<T, kRoundsFirst>(widen_part(grad + i, n), factors + i);
      narrow_part(more(splat(rstd) * (g - normed * splat(mean)), i, n), n, out + i);
    });
  };
  if (!grad_sum) return write([](Vec by_x, int64_t, auto) { return by_x; });
  write([&](Vec by_x, int64_t i, auto n) { return rounded<T>(by_x) + widen_part(grad_sum + i, n); });
}

void norm(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.weight.columns;
  with_norm(args.weight, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.weight);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row_of<T>(args.x, r);
      if (args.residual.data) {
        T* sum = static_cast<T*>(args.sum) + r * columns;
        add_row(x, row_of<T>(args.residual, r), columns, sum);
        x = sum;
      }
      T* out = static_cast<T*>(args.out) + r * columns;
      args.rstd[r] = row_rstd(x, columns, args.eps);
      norm_row<T, kRoundsFirst>(x, factors.data(), columns, args.rstd[r], out);
    }
  });
}

void norm_backward(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.weight.columns;
  with_norm(args.weight, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.weight);
    for (int64_t block = begin; block < end; ++block) {
      float* partial = args.partials ? args.partials + block * columns : nullptr;
      if (partial) std::fill(partial, partial + columns, 0.0f);
      const int64_t last = std::min((block + 1) * trl_fast::kNormBlock, args.rows);
      for (int64_t r = block * trl_fast::kNormBlock; r < last; ++r) {
        const T *grad = row_of<T>(args.grad, r), *x = row_of<T>(args.x, r);
        const float rstd = args.rstd[r];
        const float mean = mean_product<T, kRoundsFirst>(grad, x, factors.data(), columns, rstd, partial);
        if (!args.out) continue;
        const T* grad_sum = args.grad_sum.data ? row_of<T>(args.grad_sum, r) : nullptr;
        T* out = static_cast<T*>(args.out) + r * columns;
        norm_backward_row<T, kRoundsFirst>(grad, x, factors.data(), columns, rstd, mean, grad_sum, out);
      }
    }
  });
}

}  // namespace
