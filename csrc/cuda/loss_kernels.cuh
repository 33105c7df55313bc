// The loss kernels for CUDA; what they compute is specified by trl_fast/ops/pair_loss.py and policy_loss.py, and the
// formulas are those of pair_formulas.py, each beside its derivative.
//
// Every sum has an order of its own that no scheduling changes. Which loss it is, is a branch and not a template: all
// threads take the same one, and these kernels wait for memory. Offsets are 64-bit. No torch headers: the same source
// compiles as host C++ (tests/support/simt.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/loss_kernels.h"

namespace trl_fast {
namespace {

static_assert(policy_loss_blocks(kPolicyLossBlock + 1) == 2);

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }
__device__ inline float square(float x) { return x * x; }

// Unlike fminf and fmaxf, these keep a NaN: one in the input must reach the loss.
__device__ inline float at_most(float x, float bound) { return x > bound ? bound : x; }
__device__ inline float at_least(float x, float bound) { return x < bound ? bound : x; }

// e^x - x - 1; near 0, where the difference would cancel, its series.
__device__ inline float exp_beyond_linear(float x) {
  if (!(fabsf(x) < 0.5f)) return expm1f(x) - x;
  float series = 1.0f;
  for (int k = 8; k > 2; --k) series = fmaf(series, x / static_cast<float>(k), 1.0f);
  return 0.5f * x * x * series;
}

// A pair's loss and its derivatives by the two rewards.
struct PairTerm {
  float loss;
  float chosen;
  float rejected;
};

__device__ inline PairTerm of_margin(float loss, float gradient) { return {loss, gradient, -gradient}; }

__device__ inline PairTerm discopop(float x, float tau) {
  const float sharp = x / tau, rest = sigmoid(-sharp), log_p = log_sigmoid(x);
  const float mixed = expf(log_sigmoid(sharp) - x);
  const float gradient = sigmoid(sharp) * rest * log_p / tau - rest * sigmoid(-x) + mixed * (rest / tau - 1.0f);
  return of_margin(mixed - rest * log_p, gradient);
}

// `c` and `r` are the rewards of chosen and rejected: β times the log-ratio, a mean over tokens where the loss has
// one.
__device__ inline PairTerm pair_term(const PairLossArgs& args, float c, float r) {
  const float x = c - r, p = sigmoid(x), q = sigmoid(-x);
  const float beta = args.beta, eps = args.label_smoothing;
  switch (args.loss) {
    case PairLoss::kSigmoid:
    case PairLoss::kSigmoidNorm:
      return of_margin(-log_sigmoid(x), -q);
    case PairLoss::kRobust: {
      const float scale = 1.0f / (1.0f - 2.0f * eps);
      return of_margin((eps * log_sigmoid(-x) - (1.0f - eps) * log_sigmoid(x)) * scale,
                       -((1.0f - eps) * q + eps * p) * scale);
    }
    case PairLoss::kHinge:
      return of_margin(x >= 1.0f ? 0.0f : 1.0f - x, x >= 1.0f ? 0.0f : -1.0f);
    case PairLoss::kIpo: {
      const float residual = (x - 0.5f) / beta;
      return of_margin(square(residual), 2.0f * residual / beta);
    }
    case PairLoss::kExoPair: {
      const float chosen = log_sigmoid(x) - log1pf(-eps), rejected = log_sigmoid(-x) - logf(eps);
      return of_margin(p * chosen + q * rejected, p * q * (chosen - rejected));
    }
    case PairLoss::kDiscopop:
      return discopop(x, args.discopop_tau);
    case PairLoss::kNcaPair:
      return {-log_sigmoid(c) - 0.5f * (log_sigmoid(-c) + log_sigmoid(-r)), 0.5f * sigmoid(c) - sigmoid(-c),
              0.5f * sigmoid(r)};
    case PairLoss::kBcoPair:
      return {-log_sigmoid(c) - log_sigmoid(-r), -sigmoid(-c), sigmoid(r)};
    case PairLoss::kSppoHard: {
      const float chosen = (c - 0.5f) / beta, rejected = (r + 0.5f) / beta;
      return {square(chosen) + square(rejected), 2.0f * chosen / beta, 2.0f * rejected / beta};
    }
    case PairLoss::kApoZero:
      return {sigmoid(-c) + sigmoid(r), -sigmoid(c) * sigmoid(-c), sigmoid(r) * sigmoid(-r)};
    case PairLoss::kApoDown:
      return {sigmoid(c) + q, sigmoid(c) * sigmoid(-c) - p * q, p * q};
  }
  return {NAN, NAN, NAN};
}

// The sum of a sequence's log-probabilities, in the first warp.
__device__ inline float sequence_sum(const PairLossArgs& args, int64_t sequence) {
  float sum = 0.0f;
  const int64_t end = args.cu_seqlens[sequence + 1];
  for (int64_t token = args.cu_seqlens[sequence] + threadIdx.x; token < end; token += kThreads) {
    sum += args.logprobs[token];
  }
  return block_sum(sum);
}

// One block a pair.
__global__ void __launch_bounds__(kThreads) pair_loss_kernel(PairLossArgs args) {
  const int64_t pair = blockIdx.x, chosen = 2 * pair, rejected = chosen + 1;
  const float chosen_logprob = sequence_sum(args, chosen), rejected_logprob = sequence_sum(args, rejected);
  if (threadIdx.x != 0) return;
  const bool mean = args.loss == PairLoss::kSigmoidNorm || args.loss == PairLoss::kIpo;
  const auto scale = [&](int64_t sequence) {
    const int64_t length = args.lengths[sequence];
    return mean ? args.beta / static_cast<float>(length < 1 ? 1 : length) : args.beta;
  };
  const float chosen_scale = scale(chosen), rejected_scale = scale(rejected);
  const PairTerm term = pair_term(args, chosen_scale * (chosen_logprob - args.ref_logprobs[chosen]),
                                  rejected_scale * (rejected_logprob - args.ref_logprobs[rejected]));
  args.losses[pair] = term.loss;
  args.sequence_logprobs[chosen] = chosen_logprob;
  args.sequence_logprobs[rejected] = rejected_logprob;
  args.gradients[chosen] = term.chosen * chosen_scale;
  args.gradients[rejected] = term.rejected * rejected_scale;
}

// Blocks (sequence, part of it).
__global__ void __launch_bounds__(kThreads) pair_loss_backward_kernel(PairLossBackwardArgs args) {
  const int64_t sequence = blockIdx.x, step = int64_t{gridDim.y} * kThreads;
  float grad = 0.0f;
  if (args.grad_losses != nullptr) {
    grad += args.gradients[sequence] * args.grad_losses[sequence / 2 * args.grad_losses_stride];
  }
  if (args.grad_sequence_logprobs != nullptr) {
    grad += args.grad_sequence_logprobs[sequence * args.grad_sequence_logprobs_stride];
  }
  const int64_t end = args.cu_seqlens[sequence + 1];
  int64_t token = args.cu_seqlens[sequence] + int64_t{blockIdx.y} * kThreads + threadIdx.x;
  for (; token < end; token += step) args.out[token] = grad;
}

// A token's term, its derivative by log π, and whether the ratio was clipped: −1 low, 1 high.
struct TokenTerm {
  float term;
  float gradient;
  int clipped;
};

__device__ inline int clipped_at(const PolicyLossArgs& args, float ratio, float advantage) {
  return (ratio > args.upper && advantage > 0.0f) - (ratio < args.lower && advantage < 0.0f);
}

__device__ inline TokenTerm clip_term(const PolicyLossArgs& args, float ratio, float advantage) {
  const float capped = at_most(ratio, args.delta), bounded = at_most(at_least(ratio, args.lower), args.upper);
  const float unclipped = capped * advantage, clipped = bounded * advantage;
  // Where both sides are equal, so are their gradients.
  const bool constant = unclipped <= clipped ? ratio > args.delta : ratio < args.lower || ratio > args.upper;
  return {-at_most(unclipped, clipped), constant ? 0.0f : -ratio * advantage, clipped_at(args, capped, advantage)};
}

__device__ inline TokenTerm policy_term(const PolicyLossArgs& args, float ratio, float advantage, float logprob) {
  switch (args.loss) {
    case PolicyLoss::kClip:
      return clip_term(args, ratio, advantage);
    case PolicyLoss::kCispo: {
      const float gradient = -at_most(ratio, args.upper) * advantage;
      return {gradient * logprob, gradient, clipped_at(args, ratio, advantage)};
    }
    case PolicyLoss::kSapo: {
      const float temperature = advantage > 0.0f ? args.temperature_pos : args.temperature_neg;
      const float z = temperature * (ratio - 1.0f), gate = sigmoid(z);
      return {-4.0f / temperature * gate * advantage, -4.0f * gate * sigmoid(-z) * ratio * advantage, 0};
    }
  }
  return {NAN, NAN, 0};
}

// Writes what belongs to a token and returns its share of the loss.
__device__ inline float visit_token(const PolicyLossArgs& args, int64_t token) {
  const int64_t sequence = args.branch[token];
  const float logprob = args.logprobs[token], weight = args.weights[sequence];
  const float log_ratio = args.old_logprobs == nullptr ? 0.0f : logprob - args.old_logprobs[token];
  const bool ratio_capped = log_ratio > args.max_log_ratio;
  const float ratio = expf(at_most(log_ratio, args.max_log_ratio));
  TokenTerm term = policy_term(args, ratio, args.advantages[sequence], logprob);
  if (ratio_capped && args.loss != PolicyLoss::kCispo) term.gradient = 0.0f;
  if (args.ref_logprobs != nullptr) {
    const float difference = args.ref_logprobs[token] - logprob, capped = at_most(difference, args.max_log_ratio);
    float kl = exp_beyond_linear(capped), gradient = -expm1f(capped);
    if (args.bias_correct_kl) {
      kl *= ratio;
      // ρ·e^d = π_ref / π_old does not depend on π, so the gradient of ρ·(e^d − d − 1) is −d·ρ.
      gradient = (ratio_capped ? gradient : -capped) * ratio;
    }
    args.kl[token] = kl;
    term.term += args.beta * kl;
    if (!(difference > args.max_log_ratio)) term.gradient += args.beta * gradient;
  }
  args.clipped[token] = static_cast<int8_t>(term.clipped);
  args.gradients[token] = weight * term.gradient;
  return weight * term.term;
}

// Each block sums the terms of kPolicyLossBlock tokens.
__global__ void __launch_bounds__(kThreads) policy_loss_kernel(PolicyLossArgs args) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < kPolicyLossBlock; i += kThreads) {
    const int64_t token = int64_t{blockIdx.x} * kPolicyLossBlock + i;
    if (token < args.num_tokens) sum += visit_token(args, token);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) args.partial_sums[blockIdx.x] = sum;
}

// Calls launch(kernel, grid); these do nothing where there is nothing to compute.
template <typename Launch>
void dispatch_pair_loss(int64_t pairs, Launch launch) {
  if (pairs > 0) launch(pair_loss_kernel, dim3(static_cast<unsigned>(pairs)));
}

template <typename Launch>
void dispatch_pair_loss_backward(int64_t pairs, int64_t num_tokens, Launch launch) {
  if (pairs == 0) return;
  // As many blocks as equally long sequences would need; the longer ones loop.
  const int64_t parts = num_tokens / (2 * pairs * kThreads) + 1;
  launch(pair_loss_backward_kernel, dim3(static_cast<unsigned>(2 * pairs), parts < 65535 ? parts : 65535));
}

template <typename Launch>
void dispatch_policy_loss(int64_t num_tokens, Launch launch) {
  if (num_tokens > 0) launch(policy_loss_kernel, dim3(static_cast<unsigned>(policy_loss_blocks(num_tokens))));
}

}  // namespace
}  // namespace trl_fast
