// The kernels of layers, for one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// Numbers are rounded to the tensors' dtype where transformers' code rounds them, forward and backward.
#include "layer_kernels.h"

#include "row_chunks.h"

namespace {

using trl_fast::Activation;
using trl_fast::Dtype;
using trl_fast::GateArgs;
using trl_fast::NormArgs;
using trl_fast::RotaryArgs;

// The first n values, or all of a vector; zeros after them.
template <typename T>
inline Vec widen_part(const T* from, int64_t n) {
  if (n >= kWidth) return widen(from);
  T part[kWidth] = {};
  std::memcpy(part, from, n * sizeof(T));
  return widen(part);
}

// Rounds to the dtype.
template <typename T>
inline Vec rounded(Vec x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  T narrowed[kWidth];
  narrow(narrowed, x);
  return widen(narrowed);
}

// ---- RMSNorm

template <typename T>
void norm(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.columns;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
    T* out = static_cast<T*>(args.out) + r * columns;
    Vec squares[2] = {};
    for_vectors(columns, [&](int64_t i, int k) {
      const Vec v = widen_part(x + i, columns - i);
      squares[k] += v * v;
    });
    const float mean = static_cast<float>((sum_of(squares[0]) + sum_of(squares[1])) / columns);
    const float rstd = 1.0f / std::sqrt(mean + args.eps);
    args.rstd[r] = rstd;
    for (int64_t i = 0; i < columns; i += kWidth) {
      const int64_t n = columns - i;
      const Vec normed = widen_part(x + i, n) * splat(rstd), w = widen_part(weight + i, n);
      narrow_part(args.is_gemma ? normed * (splat(1.0f) + w) : rounded<T>(normed) * w, n, out + i);
    }
  }
}

// With g the gradient by the normalised row n = x rstd: the one by x is rstd (g - n mean(g n)).
template <typename T>
void norm_backward_row(const NormArgs& args, int64_t r, float* partial) {
  const int64_t columns = args.columns;
  const T* weight = static_cast<const T*>(args.weight);
  const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
  const T* grad = static_cast<const T*>(args.grad) + r * args.grad_stride;
  const Vec rstd = splat(args.rstd[r]);
  const auto by_normed = [&](Vec g, int64_t i) {
    const Vec w = widen_part(weight + i, columns - i);
    return args.is_gemma ? g * (splat(1.0f) + w) : rounded<T>(g * w);
  };
  Vec products[2] = {};
  for_vectors(columns, [&](int64_t i, int k) {
    const int64_t n = columns - i;
    const Vec normed = widen_part(x + i, n) * rstd, g = widen_part(grad + i, n);
    products[k] += by_normed(g, i) * normed;
    if (partial) {
      const Vec by_weight = g * (args.is_gemma ? normed : rounded<T>(normed));
      narrow_part(widen_part(partial + i, n) + by_weight, n, partial + i);
    }
  });
  if (!args.out) return;
  T* out = static_cast<T*>(args.out) + r * columns;
  const Vec mean = splat(static_cast<float>((sum_of(products[0]) + sum_of(products[1])) / columns));
  for (int64_t i = 0; i < columns; i += kWidth) {
    const int64_t n = columns - i;
    const Vec normed = widen_part(x + i, n) * rstd;
    narrow_part(rstd * (by_normed(widen_part(grad + i, n), i) - normed * mean), n, out + i);
  }
}

template <typename T>
void norm_backward(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* partial = args.partials ? args.partials + block * args.columns : nullptr;
    if (partial) std::fill(partial, partial + args.columns, 0.0f);
    const int64_t last = std::min((block + 1) * trl_fast::kNormBlock, args.rows);
    for (int64_t r = block * trl_fast::kNormBlock; r < last; ++r) norm_backward_row<T>(args, r, partial);
  }
}

// ---- gated activations

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

template <Activation kind>
inline Activated activated(Vec x) {
  if constexpr (kind == Activation::kSilu) return times_sigmoid(x, x, splat(1.0f));
  if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u)
    const Vec twice = splat(1.5957691216057308f), cubic = splat(0.044715f);
    const Vec square = x * x;
    return times_sigmoid(x, twice * (x + cubic * square * x), twice * (splat(1.0f) + splat(3.0f) * cubic * square));
  }
  Vec below = {};
  for (int i = 0; i < kWidth; ++i) below[i] = 0.5f * std::erfc(-0.70710678118654752f * x[i]);
  const Vec density = splat(0.3989422804014327f) * exp_vec(splat(-0.5f) * x * x);
  return {x * below, below + x * density};
}

template <typename T, Activation kind>
void gate(const GateArgs& args, int64_t begin, int64_t end) {
  const T *gates = static_cast<const T*>(args.gate), *ups = static_cast<const T*>(args.up);
  T* out = static_cast<T*>(args.out);
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t n = end - i;
    const Vec value = rounded<T>(activated<kind>(widen_part(gates + i, n)).value);
    narrow_part(value * widen_part(ups + i, n), n, out + i);
  }
}

template <typename T, Activation kind>
void gate_backward(const GateArgs& args, int64_t begin, int64_t end) {
  const T *gates = static_cast<const T*>(args.gate), *ups = static_cast<const T*>(args.up);
  const T* grads = static_cast<const T*>(args.grad);
  T *grad_gate = static_cast<T*>(args.grad_gate), *grad_up = static_cast<T*>(args.grad_up);
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t n = end - i;
    const Activated act = activated<kind>(widen_part(gates + i, n));
    const Vec grad = widen_part(grads + i, n);
    narrow_part(rounded<T>(grad * widen_part(ups + i, n)) * act.derivative, n, grad_gate + i);
    narrow_part(grad * rounded<T>(act.value), n, grad_up + i);
  }
}

template <typename T>
void gate_of(const GateArgs& args, int64_t begin, int64_t end) {
  const auto run = args.activation == Activation::kSilu       ? gate<T, Activation::kSilu>
                   : args.activation == Activation::kGeluTanh ? gate<T, Activation::kGeluTanh>
                                                              : gate<T, Activation::kGelu>;
  run(args, begin, end);
}

template <typename T>
void gate_backward_of(const GateArgs& args, int64_t begin, int64_t end) {
  const auto run = args.activation == Activation::kSilu       ? gate_backward<T, Activation::kSilu>
                   : args.activation == Activation::kGeluTanh ? gate_backward<T, Activation::kGeluTanh>
                                                              : gate_backward<T, Activation::kGelu>;
  run(args, begin, end);
}

// ---- rotary embeddings

// Halves (a, b) become (a cos_a - b sin_a, b cos_b + a sin_b); backward (a cos_a + b sin_b, b cos_b - a sin_a).
template <typename T>
void rotary(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.width / 2;
  for (int64_t place = begin; place < end; ++place) {
    const int64_t row = place / args.tokens, token = place % args.tokens;
    const T* cos = static_cast<const T*>(args.cos) + row * args.cos_strides[0] + token * args.cos_strides[1];
    const T* sin = static_cast<const T*>(args.sin) + row * args.sin_strides[0] + token * args.sin_strides[1];
    const T* first_sin = args.is_backward ? sin + half : sin;
    const T* second_sin = args.is_backward ? sin : sin + half;
    const Vec sign = splat(args.is_backward ? -1.0f : 1.0f);
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* x = static_cast<const T*>(args.x) + row * args.x_strides[0] + head * args.x_strides[1] +
                   token * args.x_strides[2];
      T* out = static_cast<T*>(args.out) + (place * args.heads + head) * args.width;
      for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t n = half - i;
        const Vec a = widen_part(x + i, n), b = widen_part(x + half + i, n);
        const Vec b_part = rounded<T>(b * widen_part(first_sin + i, n)) * sign;
        const Vec a_part = rounded<T>(a * widen_part(second_sin + i, n)) * sign;
        narrow_part(rounded<T>(a * widen_part(cos + i, n)) - b_part, n, out + i);
        narrow_part(rounded<T>(b * widen_part(cos + half + i, n)) + a_part, n, out + half + i);
      }
    }
  }
}

// One of three functions by the dtype of `args`.
template <typename Args, void (*kFloat)(const Args&, int64_t, int64_t),
          void (*kBFloat16)(const Args&, int64_t, int64_t), void (*kFloat16)(const Args&, int64_t, int64_t)>
void by_dtype(const Args& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return kFloat(args, begin, end);
    case Dtype::kBFloat16:
      return kBFloat16(args, begin, end);
    case Dtype::kFloat16:
      return kFloat16(args, begin, end);
  }
}

}  // namespace

namespace trl_fast {

extern const LayerKernels TRL_FAST_JOIN(kLayerKernels, CPU_CAPABILITY);
const LayerKernels TRL_FAST_JOIN(kLayerKernels, CPU_CAPABILITY) = {
    by_dtype<NormArgs, norm<float>, norm<BFloat16>, norm<Float16>>,
    by_dtype<NormArgs, norm_backward<float>, norm_backward<BFloat16>, norm_backward<Float16>>,
    by_dtype<GateArgs, gate_of<float>, gate_of<BFloat16>, gate_of<Float16>>,
    by_dtype<GateArgs, gate_backward_of<float>, gate_backward_of<BFloat16>, gate_backward_of<Float16>>,
    by_dtype<RotaryArgs, rotary<float>, rotary<BFloat16>, rotary<Float16>>,
};

}  // namespace trl_fast
