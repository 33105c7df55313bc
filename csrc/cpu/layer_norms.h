// RMSNorm of rows, forward and backward, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::NormArgs;
using trl_fast::NormCast;
using trl_fast::NormWeight;

// The factors of the normalised row in float32: the weight, one more for Gemma's, ones without a weight.
template <typename T>
Room<float> norm_factors(const NormWeight& weight) {
  Room<float> factors(weight.columns);
  const float more = weight.data && weight.cast != NormCast::kGemma ? 0.0f : 1.0f;
  if (weight.data) widen_chunk(static_cast<const T*>(weight.data), weight.columns, 0.0f, factors.data());
  for (int64_t i = 0; i < weight.columns; ++i) factors.data()[i] += more;
  return factors;
}

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
  for_row(columns, [&](int64_t i, int, auto n) {
    narrow_part(widen_part(x + i, n) + widen_part(residual + i, n), n, sum + i);
  });
}

// Writes the norm of a row; returns rstd.
template <typename T, bool kRoundsFirst>
inline float norm_row(const T* x, const float* factors, int64_t columns, float eps, T* out) {
  Vec squares[2] = {};
  for_row(columns, [&](int64_t i, int k, auto n) {
    const Vec v = widen_part(x + i, n);
    squares[k] += v * v;
  });
  const float rstd = 1.0f / std::sqrt(sum_in_pairs(squares[0] + squares[1]) / columns + eps);
  for_row(columns, [&](int64_t i, int, auto n) {
    const Vec normed = widen_part(x + i, n) * splat(rstd);
    narrow_part((kRoundsFirst ? rounded<T>(normed) : normed) * load(factors + i), n, out + i);
  });
  return rstd;
}

// With g the gradient by the normalised row n = x rstd: the one by x is rstd (g - n mean(g n)). partial: null, or
// where the gradient by the weight is added. out: null, or the gradient by x. grad_sum: null, or what is added to it.
template <typename T, bool kRoundsFirst>
inline void norm_backward_row(const T* grad, const T* x, const float* factors, int64_t columns, float rstd,
                              const T* grad_sum, float* partial, T* out) {
  const auto by_normed = [&](Vec g, int64_t i) {
    const Vec product = g * load(factors + i);
    return kRoundsFirst ? rounded<T>(product) : product;
  };
  Vec products[2] = {};
  for_row(columns, [&](int64_t i, int k, auto n) {
    const Vec normed = widen_part(x + i, n) * splat(rstd), g = widen_part(grad + i, n);
    products[k] += by_normed(g, i) * normed;
    if (partial) {
      const Vec by_weight = g * (kRoundsFirst ? rounded<T>(normed) : normed);
      narrow_part(widen_part(partial + i, n) + by_weight, n, partial + i);
    }
  });
  if (!out) return;
  const Vec mean = splat(sum_in_pairs(products[0] + products[1]) / columns);
  const auto write = [&](const auto& more) {
    for_row(columns, [&](int64_t i, int, auto n) {
      const Vec normed = widen_part(x + i, n) * splat(rstd);
      const Vec by_x = splat(rstd) * (by_normed(widen_part(grad + i, n), i) - normed * mean);
      narrow_part(more(by_x, i, n), n, out + i);
    });
  };
  if (!grad_sum) return write([](Vec by_x, int64_t, auto) { return by_x; });
  write([&](Vec by_x, int64_t i, auto n) { return rounded<T>(by_x) + widen_part(grad_sum + i, n); });
}

void norm(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.weight.columns;
  with_norm(args.weight, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const Room<float> factors = norm_factors<T>(args.weight);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row_of<T>(args.x, r);
      if (args.residual.data) {
        T* sum = static_cast<T*>(args.sum) + r * columns;
        add_row(x, row_of<T>(args.residual, r), columns, sum);
        x = sum;
      }
      T* out = static_cast<T*>(args.out) + r * columns;
      args.rstd[r] = norm_row<T, kRoundsFirst>(x, factors.data(), columns, args.eps, out);
    }
  });
}

void norm_backward(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.weight.columns;
  with_norm(args.weight, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const Room<float> factors = norm_factors<T>(args.weight);
    for (int64_t block = begin; block < end; ++block) {
      float* partial = args.partials ? args.partials + block * columns : nullptr;
      if (partial) std::fill(partial, partial + columns, 0.0f);
      const int64_t last = std::min((block + 1) * trl_fast::kNormBlock, args.rows);
      for (int64_t r = block * trl_fast::kNormBlock; r < last; ++r) {
        const T* grad_sum = args.grad_sum.data ? row_of<T>(args.grad_sum, r) : nullptr;
        T* out = args.out ? static_cast<T*>(args.out) + r * columns : nullptr;
        norm_backward_row<T, kRoundsFirst>(row_of<T>(args.grad, r), row_of<T>(args.x, r), factors.data(), columns,
                                           args.rstd[r], grad_sum, partial, out);
      }
    }
  });
}

}  // namespace
