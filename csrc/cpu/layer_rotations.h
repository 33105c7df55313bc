// Rotary embeddings of heads, alone and after a norm, once per translation unit.
#pragma once

#include "layer_norms.h"

namespace {

using trl_fast::Heads;
using trl_fast::NormRotaryArgs;
using trl_fast::Pairs;
using trl_fast::RotaryArgs;
using trl_fast::Turns;

// The first and the second numbers of kTwo pairs.
struct PairsOfTwo {
  Two a, b;
};

// Pairs i to i + n. kOrder: whether halves are put in the order "by pairs"; adjacent pairs come as they lie in memory.
template <bool kAdjacent, bool kOrder, typename T, typename N>
TRL_FAST_INLINE inline PairsOfTwo load_pairs(const T* x, int64_t half, int64_t i, N n, int64_t ahead) {
  if constexpr (!kAdjacent) {
    return {reordered<kByPairs<T>, kOrder>(read_two(x + i, n, ahead)),
            reordered<kByPairs<T>, kOrder>(read_two(x + half + i, n, ahead))};
  } else {
    const Two first = reordered<kByPairs<T>, true>(read_two(x + 2 * i, first_of_two(n), ahead));
    const Two second = reordered<kByPairs<T>, true>(read_two(x + 2 * i + kTwo, second_of_two(n), ahead));
    return {{first.a, second.a}, {first.b, second.b}};
  }
}

template <bool kAdjacent, bool kOrder, typename T, typename N>
TRL_FAST_INLINE inline void store_pairs(PairsOfTwo pairs, T* x, int64_t half, int64_t i, N n, int64_t ahead) {
  if constexpr (!kAdjacent) {
    write_two(x + i, reordered<kOrder, kByPairs<T>>(pairs.a), n, ahead);
    write_two(x + half + i, reordered<kOrder, kByPairs<T>>(pairs.b), n, ahead);
  } else {
    write_two(x + 2 * i, reordered<true, kByPairs<T>>({pairs.a.a, pairs.b.a}), first_of_two(n), ahead);
    write_two(x + 2 * i + kTwo, reordered<true, kByPairs<T>>({pairs.a.b, pairs.b.b}), second_of_two(n), ahead);
  }
}

// The heads of a token to turn. x: every `stride` numbers one; out: one behind the other.
template <typename T>
struct HeadsOfToken {
  const T* x;
  int64_t stride, heads, width;
  T* out;
  int64_t read_ahead = kAhead, write_ahead = kAhead;  // 0 of room of our own
};

// The factors of a token's turn: (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b).
class TokenTurn {
 public:
  explicit TokenTurn(const Turns& turns)
      : turns_(turns), half_(turns.width / 2), room_(padded_to_two(half_)), factors_(4 * room_) {}

  // Reads the factors of a token for heads of T.
  template <typename T>
  void read(int64_t row, int64_t token) {
    float *cos = factors_.data(), *sin = cos + 2 * room_;
    const int64_t cos_row = row * turns_.cos_strides[0] + token * turns_.cos_strides[1];
    const int64_t sin_row = row * turns_.sin_strides[0] + token * turns_.sin_strides[1];
    with_type(turns_.dtype, [&]<typename Angle>(Angle*) {
      read_row<T>(static_cast<const Angle*>(turns_.cos) + cos_row, cos, cos + room_);
      read_row<T>(static_cast<const Angle*>(turns_.sin) + sin_row, sin, sin + room_);
    });
    if (turns_.is_backward) {
      for (int64_t i = 0; i < room_; ++i) {
        const float first = sin[i];
        sin[i] = -sin[room_ + i];
        sin[room_ + i] = -first;
      }
    }
  }

  // Turns the first numbers of a token's heads and copies the others.
  template <typename T>
  void apply(const HeadsOfToken<T>& all) const {
    const bool reads_adjacent =
        turns_.pairs == Pairs::kAdjacent || (turns_.pairs == Pairs::kAdjacentToHalves && !turns_.is_backward);
    const bool writes_adjacent =
        turns_.pairs == Pairs::kAdjacent || (turns_.pairs == Pairs::kAdjacentToHalves && turns_.is_backward);
    if (turns_.upcast) {
      turn<T, false>(all, reads_adjacent, writes_adjacent);
    } else {
      turn<T, true>(all, reads_adjacent, writes_adjacent);
    }
    for (int64_t head = 0; all.width > turns_.width && head < all.heads; ++head) {
      std::memcpy(all.out + head * all.width + turns_.width, all.x + head * all.stride + turns_.width,
                  (all.width - turns_.width) * sizeof(T));
    }
  }

 private:
  // Widens cos or sin of a token, those of first numbers of pairs and those of second ones, in the order of the heads'
  // numbers that they are multiplied by.
  template <typename T, typename Angle>
  void read_row(const Angle* row, float* first, float* second) const {
    if (turns_.pairs == Pairs::kHalves) {
      widen_row<kByPairs<T>>(row, half_, first);
      if (!turns_.one_angle_a_pair) return widen_row<kByPairs<T>>(row + half_, half_, second);
    } else if (turns_.one_angle_a_pair) {
      widen_row<false>(row, half_, first);
    } else {
      return for_row(2 * half_, [&](int64_t i, auto n) TRL_FAST_INLINE {
        const Two both = reordered<kByPairs<Angle>, true>(widen_two(row + i, n));
        store(first + i / 2, both.a);
        store(second + i / 2, both.b);
      });
    }
    std::copy(first, first + room_, second);
  }

  template <typename T, bool kRounds>
  void turn(const HeadsOfToken<T>& all, bool reads_adjacent, bool writes_adjacent) const {
    if (reads_adjacent && writes_adjacent) return turn_pairs<kRounds, true, true>(all);
    if (reads_adjacent) return turn_pairs<kRounds, true, false>(all);
    if (writes_adjacent) return turn_pairs<kRounds, false, true>(all);
    turn_pairs<kRounds, false, false>(all);
  }

  template <bool kRounds, bool kFrom, bool kTo, typename T>
  void turn_pairs(const HeadsOfToken<T>& all) const {
    constexpr bool by_pairs = kByPairs<T> && !kFrom && !kTo;
    const auto product = [](Two left, Two right)
                             TRL_FAST_INLINE { return kRounds ? rounded<T>(left * right) : left * right; };
    const float *cos = factors_.data(), *sin = cos + 2 * room_;
    const T* x = all.x;
    T* out = all.out;
    for (int64_t head = 0; head < all.heads; ++head, x += all.stride, out += all.width) {
      for_row(half_, [&](int64_t i, auto n) TRL_FAST_INLINE {
        const PairsOfTwo x_pairs = load_pairs<kFrom, by_pairs>(x, half_, i, n, all.read_ahead);
        const Two a = product(x_pairs.a, load_two(cos + i)) - product(x_pairs.b, load_two(sin + i));
        const Two b = product(x_pairs.b, load_two(cos + room_ + i)) + product(x_pairs.a, load_two(sin + room_ + i));
        store_pairs<kTo, by_pairs>({a, b}, out, half_, i, n, all.write_ahead);
      });
    }
  }

  const Turns& turns_;
  const int64_t half_, room_;
  Room<float> factors_;  // cos and sin of first and of second numbers
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
      turn.read<T>(row, token);
      turn.apply<T>({head_at<T>(heads.x, heads.x_strides, row, 0, token), heads.x_strides[1], heads.heads, heads.width,
                     static_cast<T*>(args.out) + place * heads.heads * heads.width});
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
    const Room<T> normed(heads.heads * heads.width);
    const int64_t stride = padded_to_two(columns);
    const Room<float> widened(norms * stride);
    for (int64_t place = begin; place < end; ++place) {
      const int64_t row = place / heads.tokens, token = place % heads.tokens;
      const auto x = [&](int64_t k) { return head_at<T>(heads.x, heads.x_strides, row, k, token); };
      float* rstd = args.rstd + place * norms;
      for (int64_t k = 0; k < norms; ++k) rstd[k] = sum_of_squares(x(k), columns, widened.data() + k * stride);
      for (int64_t k = 0; k < norms; ++k) rstd[k] = rstd_of(rstd[k], columns, args.eps);
      turn.read<T>(row, token);
      for (int64_t k = 0; k < norms; ++k) {
        norm_row<T, kRoundsFirst>(x(k), widened.data() + k * stride, factors.data(), columns, rstd[k],
                                  normed.data() + k * columns);
      }
      T* out = static_cast<T*>(args.out) + place * heads.heads * heads.width;
      turn.apply<T>({normed.data(), heads.width, heads.heads, heads.width, out, 0});
    }
  });
}

void norm_rotary_backward(const NormRotaryArgs& args, int64_t tokens, int64_t begin, int64_t end) {
  const Heads& heads = args.heads;
  const int64_t columns = args.norm.columns, norms = heads.heads * heads.width / columns;
  TokenTurn turn(args.turns);
  with_norm(args.norm, [&]<typename T, bool kRoundsFirst>(T*, std::bool_constant<kRoundsFirst>) {
    const NormFactors<T> factors(args.norm);
    const int64_t stride = padded_to_two(columns);
    const Room<float> means(norms), g_rows(norms * stride), n_rows(norms * stride);
    const Room<T> grads(heads.heads * heads.width);
    WeightSums<T> sums(columns);
    float* added_to = args.partials ? sums.data() : nullptr;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * trl_fast::kTokenBlock, tokens);
      for (int64_t place = block * trl_fast::kTokenBlock; place < last; ++place) {
        const int64_t row = place / heads.tokens, token = place % heads.tokens;
        const auto x = [&](int64_t k) { return head_at<T>(heads.x, heads.x_strides, row, k, token); };
        const float* rstd = args.rstd + place * norms;
        turn.read<T>(row, token);
        turn.apply<T>({head_at<T>(args.grad, args.grad_strides, row, 0, token), args.grad_strides[1], heads.heads,
                       heads.width, grads.data(), kAhead, 0});
        const auto norm_row_of = [&](int64_t k) {
          return BackwardRow<T>{grads.data() + k * columns, x(k), factors.data(), rstd[k], g_rows.data() + k * stride,
                                n_rows.data() + k * stride};
        };
        for (int64_t k = 0; k < norms; ++k) {
          means.data()[k] = mean_product<kRoundsFirst>(norm_row_of(k), columns, added_to);
        }
        for (int64_t k = 0; args.out && k < norms; ++k) {
          T* out = static_cast<T*>(args.out) + (place * norms + k) * columns;
          norm_backward_row<T>(norm_row_of(k), columns, means.data()[k], nullptr, out);
        }
      }
      if (args.partials) sums.write(args.partials + block * columns);
    }
  });
}

}  // namespace
