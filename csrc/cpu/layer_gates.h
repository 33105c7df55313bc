// Gated activations, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::Activation;
using trl_fast::GateArgs;

struct Activated {
  Vec value, derivative;
};

// x sigmoid(z), with the derivative of z. Below z = -88, where e^-z leaves float32, the result is 0; -inf and NaN give
// NaN, as in PyTorch.
inline Activated times_sigmoid(Vec x, Vec z, Vec dz) {
  const Vec e = exp_vec(-z > splat(88.0f) ? splat(88.0f) : -z);
  const Vec denominator = splat(1.0f) + e;
  const Vec sigmoid = splat(1.0f) / denominator;
  const auto is_low = z < splat(-88.0f);
  // x dz (1 - sigmoid) overflows only where the sigmoid is 1 exactly, and then its factor is 0.
  const Vec change = x * (e * sigmoid) * dz;
  const Vec kept = z > splat(88.0f) ? Vec{} : change;
  const Vec nothing = x * Vec{};
  return {is_low ? nothing : x / denominator, is_low ? nothing : sigmoid * (splat(1.0f) + kept)};
}

struct Below {
  Vec share, density;
};

// The share of a standard normal distribution below x, erfc(-x / sqrt 2) / 2, and its density, to some ulp also far
// below 0: with a = |x| / sqrt 2, (1 + 2 a) e^(a^2) erfc(a) - 1 is a polynomial in (a - 2) / (a + 2) (N. Juffa's
// erfcf, after M. Shepherd and J. Laframboise, Mathematics of Computation 36, 1981).
inline Below standard_normal_below(Vec x) {
  const Vec scaled = (x < Vec{} ? -x : x) * splat(0.70710678118654752f);
  const Vec a = scaled > splat(16.0f) ? splat(16.0f) : scaled;
  const Vec q = (a - splat(2.0f)) / (a + splat(2.0f));
  Vec p = splat(-4.01139259e-4f) * q + splat(-1.23075210e-3f);
  p = p * q + splat(1.31355342e-3f);
  p = p * q + splat(8.63227434e-3f);
  p = p * q + splat(-8.05991981e-3f);
  p = p * q + splat(-5.42046614e-2f);
  p = p * q + splat(1.64055392e-1f);
  p = p * q + splat(-1.66031361e-1f);
  p = p * q + splat(-9.27639827e-2f);
  p = p * q + splat(2.76978403e-1f);
  const Vec bell = exp_vec(-a * a);
  const Vec tail = splat(0.5f) * bell * (splat(1.0f) + p) / (splat(1.0f) + splat(2.0f) * a);
  return {x < Vec{} ? tail : splat(1.0f) - tail, splat(0.3989422804014327f) * bell};
}

template <Activation kind>
inline Activated activated(Vec x) {
  if constexpr (kind == Activation::kSilu) return times_sigmoid(x, x, splat(1.0f));
  if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u)
    const Vec twice = splat(1.5957691216057308f), cubic = splat(0.044715f);
    const Vec square = x * x;
    return times_sigmoid(x, twice * (x + cubic * square * x), twice * (splat(1.0f) + splat(3.0f) * cubic * square));
  }
  const Below below = standard_normal_below(x);
  return {x * below.share, below.share + x * below.density};
}

// Calls f(row, column, n) for the parts of rows that elements begin to end are.
template <typename F>
inline void for_parts(int64_t columns, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t column = begin % columns, n = std::min(columns - column, end - begin);
    f(begin / columns, column, n);
    begin += n;
  }
}

template <typename T, Activation kind>
void gate(const GateArgs& args, int64_t begin, int64_t end) {
  for_parts(args.columns, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t from = row * args.stride + column;
    const T *gates = static_cast<const T*>(args.gate) + from, *ups = static_cast<const T*>(args.up) + from;
    T* out = static_cast<T*>(args.out) + row * args.columns + column;
    for_row(count, [&](int64_t i, int, auto n) TRL_FAST_INLINE {
      const Vec value = rounded<T>(activated<kind>(widen_part(gates + i, n)).value);
      narrow_part(value * widen_part(ups + i, n), n, out + i);
    });
  });
}

template <typename T, Activation kind>
void gate_backward(const GateArgs& args, int64_t begin, int64_t end) {
  for_parts(args.columns, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t from = row * args.stride + column, to = row * args.grad_stride + column;
    const T *gates = static_cast<const T*>(args.gate) + from, *ups = static_cast<const T*>(args.up) + from;
    const T* grads = static_cast<const T*>(args.grad) + row * args.columns + column;
    T *grad_gate = static_cast<T*>(args.grad_gate) + to, *grad_up = static_cast<T*>(args.grad_up) + to;
    for_row(count, [&](int64_t i, int, auto n) TRL_FAST_INLINE {
      const Activated act = activated<kind>(widen_part(gates + i, n));
      const Vec grad = widen_part(grads + i, n);
      narrow_part(rounded<T>(grad * widen_part(ups + i, n)) * act.derivative, n, grad_gate + i);
      narrow_part(grad * rounded<T>(act.value), n, grad_up + i);
    });
  });
}

// Calls a function with the C++ type of a dtype and with an activation.
template <typename F>
inline void with_activation(const GateArgs& args, F f) {
  with_type(args.dtype, [&](auto* type) {
    switch (args.activation) {
      case Activation::kSilu:
        return f(type, std::integral_constant<Activation, Activation::kSilu>{});
      case Activation::kGeluTanh:
        return f(type, std::integral_constant<Activation, Activation::kGeluTanh>{});
      case Activation::kGelu:
        return f(type, std::integral_constant<Activation, Activation::kGelu>{});
    }
  });
}

void gate_of(const GateArgs& args, int64_t begin, int64_t end) {
  with_activation(args, [&]<typename T, Activation kind>(T*, std::integral_constant<Activation, kind>) {
    gate<T, kind>(args, begin, end);
  });
}

void gate_backward_of(const GateArgs& args, int64_t begin, int64_t end) {
  with_activation(args, [&]<typename T, Activation kind>(T*, std::integral_constant<Activation, kind>) {
    gate_backward<T, kind>(args, begin, end);
  });
}

}  // namespace
