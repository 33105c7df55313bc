// Rotary embeddings of heads, alone and after a norm, once per translation unit.
#pragma once

#include <type_traits>
#include <utility>

#include "layer_norms.h"

namespace {

using trl_fast::Heads;
using trl_fast::NormRotaryArgs;
using trl_fast::Pairs;
using trl_fast::RotaryArgs;
using trl_fast::Turns;

struct Pair {
  Vec a, b;
};

// Numbers with even and odd places in two vectors, and back.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <int... kPlaces>
inline Pair split_pairs(Vec first, Vec second, std::integer_sequence<int, kPlaces...>) {
  return {__builtin_shufflevector(first, second, (2 * kPlaces)...),
          __builtin_shufflevector(first, second, (2 * kPlaces + 1)...)};
}
template <int... kPlaces>
inline Pair join_pairs(Vec a, Vec b, std::integer_sequence<int, kPlaces...>) {
  return {__builtin_shufflevector(a, b, (kPlaces / 2 + kPlaces % 2 * kWidth)...),
          __builtin_shufflevector(a, b, ((kPlaces + kWidth) / 2 + kPlaces % 2 * kWidth)...)};
}
#else
template <int... kPlaces>
inline Pair split_pairs(Vec first, Vec second, std::integer_sequence<int, kPlaces...>) {
  float both[2 * kWidth];
  store(both, first);
  store(both + kWidth, second);
  return {Vec{both[2 * kPlaces]...}, Vec{both[2 * kPlaces + 1]...}};
}
template <int... kPlaces>
inline Pair join_pairs(Vec a, Vec b, std::integer_sequence<int, kPlaces...>) {
  float both[2 * kWidth];
  for (int i = 0; i < kWidth; ++i) {
    both[2 * i] = a[i];
    both[2 * i + 1] = b[i];
  }
  return {load(both), load(both + kWidth)};
}
#endif
constexpr std::make_integer_sequence<int, kWidth> kPlacesOfVector{};

// Values i to i + n of the first and the second numbers of pairs.
template <bool kAdjacent, typename T, typename N>
inline Pair load_pairs(const T* x, int64_t half, int64_t i, N n) {
  if constexpr (!kAdjacent) {
    return {widen_part(x + i, n), widen_part(x + half + i, n)};
  } else {
    const T* from = x + 2 * i;
    if constexpr (std::is_same_v<N, Whole>)
      return split_pairs(widen(from), widen(from + kWidth), kPlacesOfVector);
    else
      return split_pairs(widen_part(from, 2 * n), widen_part(from + kWidth, 2 * n - kWidth), kPlacesOfVector);
  }
}

template <bool kAdjacent, typename T, typename N>
inline void store_pairs(Pair pair, T* x, int64_t half, int64_t i, N n) {
  if constexpr (!kAdjacent) {
    narrow_part(pair.a, n, x + i);
    narrow_part(pair.b, n, x + half + i);
  } else {
    const Pair joined = join_pairs(pair.a, pair.b, kPlacesOfVector);
    T* to = x + 2 * i;
    if constexpr (std::is_same_v<N, Whole>) {
      narrow(to, joined.a);
      narrow(to + kWidth, joined.b);
    } else {
      narrow_part(joined.a, 2 * n, to);
      if (2 * n > kWidth) narrow_part(joined.b, 2 * n - kWidth, to + kWidth);
    }
  }
}

// The factors of a token's turn: (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b).
class TokenTurn {
 public:
  explicit TokenTurn(const Turns& turns)
      : turns_(turns), half_(turns.width / 2), room_(padded(half_)), factors_(4 * room_ + 2 * half_) {}

  // Reads the factors of a token.
  void read(int64_t row, int64_t token) {
    float *cos = factors_.data(), *sin = cos + 2 * room_;
    read_row(turns_.cos, row * turns_.cos_strides[0] + token * turns_.cos_strides[1], cos, cos + room_);
    read_row(turns_.sin, row * turns_.sin_strides[0] + token * turns_.sin_strides[1], sin, sin + room_);
    if (turns_.is_backward) {
      for (int64_t i = 0; i < half_; ++i) {
        const float first = sin[i];
        sin[i] = -sin[room_ + i];
        sin[room_ + i] = -first;
      }
    }
  }

  // Turns the first numbers of a head and copies the others.
  template <typename T>
  void apply(const T* x, int64_t width, T* out) const {
    const bool reads_adjacent =
        turns_.pairs == Pairs::kAdjacent || (turns_.pairs == Pairs::kAdjacentToHalves && !turns_.is_backward);
    const bool writes_adjacent =
        turns_.pairs == Pairs::kAdjacent || (turns_.pairs == Pairs::kAdjacentToHalves && turns_.is_backward);
    if (turns_.upcast) {
      turn<T, false>(x, reads_adjacent, writes_adjacent, out);
    } else {
      turn<T, true>(x, reads_adjacent, writes_adjacent, out);
    }
    if (width > turns_.width) std::memcpy(out + turns_.width, x + turns_.width, (width - turns_.width) * sizeof(T));
  }

 private:
  // Widens cos or sin of a token, those of first numbers of pairs and those of second ones.
  void read_row(const void* from, int64_t offset, float* first, float* second) {
    with_type(turns_.dtype, [&](auto* type) {
      const auto* row = static_cast<decltype(type)>(const_cast<void*>(from)) + offset;
      if (turns_.one_angle_a_pair) {
        widen_values(row, half_, first);
        std::copy(first, first + half_, second);
      } else if (turns_.pairs == Pairs::kHalves) {
        widen_values(row, half_, first);
        widen_values(row + half_, half_, second);
      } else {
        float* all = factors_.data() + 4 * room_;
        widen_values(row, 2 * half_, all);
        for (int64_t i = 0; i < half_; ++i) {
          first[i] = all[2 * i];
          second[i] = all[2 * i + 1];
        }
      }
    });
  }

  template <typename T>
  static void widen_values(const T* from, int64_t n, float* to) {
    for_row(n, [&](int64_t i, int, auto count)
                   TRL_FAST_INLINE { narrow_part(widen_part(from + i, count), count, to + i); });
  }

  template <typename T, bool kRounds>
  void turn(const T* x, bool reads_adjacent, bool writes_adjacent, T* out) const {
    if (reads_adjacent && writes_adjacent) return turn_pairs<T, kRounds, true, true>(x, out);
    if (reads_adjacent) return turn_pairs<T, kRounds, true, false>(x, out);
    if (writes_adjacent) return turn_pairs<T, kRounds, false, true>(x, out);
    turn_pairs<T, kRounds, false, false>(x, out);
  }

  template <typename T, bool kRounds, bool kFrom, bool kTo>
  void turn_pairs(const T* x, T* out) const {
    const auto product = [](Vec left, Vec right) { return kRounds ? rounded<T>(left * right) : left * right; };
    const float *cos = factors_.data(), *sin = cos + 2 * room_;
    for_row(half_, [&](int64_t i, int, auto n) TRL_FAST_INLINE {
      const Pair pair = load_pairs<kFrom>(x, half_, i, n);
      const Vec a = product(pair.a, load(cos + i)) - product(pair.b, load(sin + i));
      const Vec b = product(pair.b, load(cos + room_ + i)) + product(pair.a, load(sin + room_ + i));
      store_pairs<kTo>({a, b}, out, half_, i, n);
    });
  }

  const Turns& turns_;
  const int64_t half_, room_;
  Room<float> factors_;  // cos and sin of first and second numbers, and room for a row as it is given
};

template <typename T>
inline const T* head_at(const void* from, const int64_t* strides, int64_t row, int64_t head, int64_t token) {
  return static_cast<const T*>(from) + row * strides[0] + head * strides[1] + token * strides[2];
}

void rotary(const RotaryArgs& args, int64_t begin, int64_t end) {
  const Heads& heads = args.heads;
  TokenTurn turn(args.turns);
  with_type(heads.dtype, [&]<typename T>(T*) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t row = place / heads.tokens, token = place % heads.tokens;
      turn.read(row, token);
      T* out = static_cast<T*>(args.out) + place * heads.heads * heads.width;
      for (int64_t head = 0; head < heads.heads; ++head, out += heads.width) {
        turn.apply(head_at<T>(heads.x, heads.x_strides, row, head, token), heads.width, out);
      }
    }
  });
}

// The norms of a token are begun together, and then ended: one would wait for its sum and its root.
void norm_rotary(const NormRotaryArgs& args, int64_t begin, int64_t end) {
  const Heads& heads = args.heads;
  const int64_t columns = args.norm.columns, norms = heads.heads * heads.width / columns;
  TokenTurn turn(args.turns);
  with_norm(args.norm, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.norm);
    const Room<T> normed(columns);
    for (int64_t place = begin; place < end; ++place) {
      const int64_t row = place / heads.tokens, token = place % heads.tokens;
      const auto x = [&](int64_t k) { return head_at<T>(heads.x, heads.x_strides, row, k, token); };
      float* rstd = args.rstd + place * norms;
      for (int64_t k = 0; k < norms; ++k) rstd[k] = row_rstd(x(k), columns, args.eps);
      turn.read(row, token);
      T* out = static_cast<T*>(args.out) + place * heads.heads * heads.width;
      for (int64_t k = 0; k < norms; ++k) {
        norm_row<T, kRoundsFirst>(x(k), factors.data(), columns, rstd[k], normed.data());
        for (int64_t i = 0; i < columns; i += heads.width, out += heads.width) {
          turn.apply(normed.data() + i, heads.width, out);
        }
      }
    }
  });
}

void norm_rotary_backward(const NormRotaryArgs& args, int64_t tokens, int64_t begin, int64_t end) {
  const Heads& heads = args.heads;
  const int64_t columns = args.norm.columns, norms = heads.heads * heads.width / columns;
  TokenTurn turn(args.turns);
  with_norm(args.norm, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.norm);
    const Room<float> means(norms);
    const Room<T> grads(heads.heads * heads.width);
    for (int64_t block = begin; block < end; ++block) {
      float* partial = args.partials ? args.partials + block * columns : nullptr;
      if (partial) std::fill(partial, partial + columns, 0.0f);
      const int64_t last = std::min((block + 1) * trl_fast::kTokenBlock, tokens);
      for (int64_t place = block * trl_fast::kTokenBlock; place < last; ++place) {
        const int64_t row = place / heads.tokens, token = place % heads.tokens;
        const auto x = [&](int64_t k) { return head_at<T>(heads.x, heads.x_strides, row, k, token); };
        const float* rstd = args.rstd + place * norms;
        turn.read(row, token);
        for (int64_t head = 0; head < heads.heads; ++head) {
          const T* turned = head_at<T>(args.grad, args.grad_strides, row, head, token);
          turn.apply(turned, heads.width, grads.data() + head * heads.width);
        }
        for (int64_t k = 0; k < norms; ++k) {
          means.data()[k] = mean_product<T, kRoundsFirst>(grads.data() + k * columns, x(k), factors.data(), columns,
                                                          rstd[k], partial);
        }
        for (int64_t k = 0; args.out && k < norms; ++k) {
          T* out = static_cast<T*>(args.out) + (place * norms + k) * columns;
          norm_backward_row<T, kRoundsFirst>(grads.data() + k * columns, x(k), factors.data(), columns, rstd[k],
                                             means.data()[k], static_cast<const T*>(nullptr), out);
        }
      }
    }
  });
}

}  // namespace
