// Gated activations, once per translation unit.
#pragma once

#include "layer_rows.h"

namespace {

using trl_fast::Activation;
using trl_fast::GateArgs;

template <typename V>
struct Activated {
  V value, derivative;
};

// The nearest number of an interval; NaN stays NaN.
TRL_FAST_INLINE inline Vec within(float lowest, Vec x, float largest) {
  return maximum(splat(lowest), minimum(splat(largest), x));
}

// x sigmoid(z), and sigmoid(z) (1 + near dz (1 - sigmoid(z))), for -88.6 <= z <= 87.3. Below z = -88, where e^-z is
// about to leave float32, the sigmoid is 0; then x = -inf gives NaN, as in PyTorch. near: x where the sigmoid is not 0
// or 1.
template <typename Digits>
TRL_FAST_INLINE inline Activated<Vec> times_sigmoid(Vec x, Vec near, Vec z, Vec dz) {
  const Vec e = exp_between(static_cast<const Digits*>(nullptr), -z);
  const Vec inverse = splat(1.0f) / (splat(1.0f) + e);
  const Vec sigmoid = z < splat(-88.0f) ? Vec{} : inverse;
  return {x * sigmoid, sigmoid * (near * (e * sigmoid) * dz) + sigmoid};
}

struct Below {
  Vec share, density;
};

// (1 + 2 a) e^(a^2) erfc(a) - 1 as a polynomial in q = (a - 2) / (a + 2), for 0 <= a: to float32's digits (N. Juffa's
// erfcf, after M. Shepherd and J. Laframboise, Mathematics of Computation 36, 1981).
TRL_FAST_INLINE inline Vec scaled_erfc(const float*, Vec q) {
  Vec p = splat(-4.01139259e-4f) * q + splat(-1.23075210e-3f);
  p = p * q + splat(1.31355342e-3f);
  p = p * q + splat(8.63227434e-3f);
  p = p * q + splat(-8.05991981e-3f);
  p = p * q + splat(-5.42046614e-2f);
  p = p * q + splat(1.64055392e-1f);
  p = p * q + splat(-1.66031361e-1f);
  p = p * q + splat(-9.27639827e-2f);
  return p * q + splat(2.76978403e-1f);
}

// To 7e-6, for what is rounded to 16 bits: a minimax polynomial for a <= 9.5.
TRL_FAST_INLINE inline Vec scaled_erfc(const uint16_t*, Vec q) {
  Vec p = splat(5.1973555e-3f) * q + splat(-7.81144744e-3f);
  p = p * q + splat(-5.2243696e-2f);
  p = p * q + splat(1.64162407e-1f);
  p = p * q + splat(-1.66360866e-1f);
  p = p * q + splat(-9.27779992e-2f);
  return p * q + splat(2.76987115e-1f);
}

// The share of a standard normal distribution below x, erfc(-x / sqrt 2) / 2, and its density, to some ulp also far
// below 0; where e^(-x^2 / 2) is about to leave float32, the tail is 0.
template <typename Digits>
TRL_FAST_INLINE inline Below standard_normal_below(Vec x) {
  constexpr const Digits* digits = nullptr;
  const Vec scaled = (x < Vec{} ? -x : x) * splat(0.70710678118654752f);
  const auto is_far = scaled > splat(9.3f);
  const Vec a = minimum(splat(9.3f), scaled);
  const Vec bell = is_far ? Vec{} : exp_between(digits, -a * a);
  // One division for q and for what is divided by 1 + 2 a.
  const Vec sum = a + splat(2.0f), twice = splat(1.0f) + splat(2.0f) * a;
  const Vec inverse = splat(1.0f) / (sum * twice);
  const Vec p = scaled_erfc(digits, (a - splat(2.0f)) * (twice * inverse));
  const Vec tail = (splat(0.5f) * bell) * (splat(1.0f) + p) * (sum * inverse);
  return {x < Vec{} ? tail : splat(1.0f) - tail, splat(0.3989422804014327f) * bell};
}

template <typename T, Activation kind>
TRL_FAST_INLINE inline Activated<Vec> activated(Vec x) {
  using Digits = std::conditional_t<sizeof(T) == 2, uint16_t, float>;
  if constexpr (kind == Activation::kSilu) {
    const Vec near = within(-88.6f, x, 87.3f);
    return times_sigmoid<Digits>(x, near, near, splat(1.0f));
  }
  if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u), 2 u = c x (1 + d x^2), which is 87.31 at x = 10 and 88.47 at 10.05
    constexpr float c = 1.5957691216057308f, d = 0.044715f;
    const Vec near = within(-10.05f, x, 10.0f), square = near * near;
    return times_sigmoid<Digits>(x, near, near * (splat(c) + splat(c * d) * square),
                                 splat(c) + splat(3 * c * d) * square);
  }
  const Below below = standard_normal_below<Digits>(x);
  return {x * below.share, below.share + x * below.density};
}

// How many 16-bit numbers are activated before the first of them is rounded and multiplied. A CPU has a few numbers'
// chains of instructions in view; if they are shorter, it finds more that need not wait. float32 numbers wait for
// memory.
constexpr int64_t kGateBlock = 512;

// Calls f(row, column, n) for the parts of rows that elements begin to end are; if T has 16 bits, for blocks of them.
template <typename T, typename F>
inline void for_parts(int64_t columns, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t column = begin % columns, rest = std::min(columns - column, end - begin);
    const int64_t n = sizeof(T) == 2 ? std::min(rest, kGateBlock) : rest;
    f(begin / columns, column, n);
    begin += n;
  }
}

// Calls f(activated, i, n) for a part of a row. kDerivatives: else f needs values only.
template <Activation kind, bool kDerivatives, typename T, typename F>
TRL_FAST_INLINE inline void for_activated(const T* gates, int64_t count, F f) {
  const auto activate = [&](int64_t i, auto n) TRL_FAST_INLINE {
    const Two x = read_two(gates + i, n);
    const Activated<Vec> a = activated<T, kind>(x.a), b = activated<T, kind>(x.b);
    return Activated<Two>{{a.value, b.value}, {a.derivative, b.derivative}};
  };
  if constexpr (sizeof(T) == 4) {
    return for_row(count, [&](int64_t i, auto n) TRL_FAST_INLINE { f(activate(i, n), i, n); });
  }
  alignas(64) float values[kGateBlock], derivatives[kGateBlock];
  for_row(count, [&](int64_t i, auto n) TRL_FAST_INLINE {
    const Activated<Two> at_x = activate(i, n);
    store_two(values + i, at_x.value);
    if constexpr (kDerivatives) store_two(derivatives + i, at_x.derivative);
  });
  for_row(count, [&](int64_t i, auto n) TRL_FAST_INLINE {
    f(Activated<Two>{load_two(values + i), kDerivatives ? load_two(derivatives + i) : Two{}}, i, n);
  });
}

template <typename T, Activation kind>
void gate(const GateArgs& args, int64_t begin, int64_t end) {
  for_parts<T>(args.columns, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t from = row * args.stride + column;
    const T *gates = static_cast<const T*>(args.gate) + from, *ups = static_cast<const T*>(args.up) + from;
    T* out = static_cast<T*>(args.out) + row * args.columns + column;
    for_activated<kind, false>(gates, count, [&](Activated<Two> gate, int64_t i, auto n) TRL_FAST_INLINE {
      write_two(out + i, rounded<T>(gate.value) * read_two(ups + i, n), n);
    });
  });
}

template <typename T, Activation kind>
void gate_backward(const GateArgs& args, int64_t begin, int64_t end) {
  for_parts<T>(args.columns, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const int64_t from = row * args.stride + column, to = row * args.grad_stride + column;
    const T *gates = static_cast<const T*>(args.gate) + from, *ups = static_cast<const T*>(args.up) + from;
    const T* grads = static_cast<const T*>(args.grad) + row * args.columns + column;
    T *grad_gate = static_cast<T*>(args.grad_gate) + to, *grad_up = static_cast<T*>(args.grad_up) + to;
    for_activated<kind, true>(gates, count, [&](Activated<Two> gate, int64_t i, auto n) TRL_FAST_INLINE {
      const Two grad = read_two(grads + i, n), up = read_two(ups + i, n);
      write_two(grad_gate + i, rounded<T>(grad * up) * gate.derivative, n);
      write_two(grad_up + i, grad * rounded<T>(gate.value), n);
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
