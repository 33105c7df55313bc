// Declares the arguments and launchers of the CUDA loss kernels. trl_fast/ops/pair_loss.py and policy_loss.py specify
// what they compute, under the same names. Pointers are into device memory.
#pragma once

#include <cstdint>

#include "loss_formulas.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace trl_fast {

struct PairLossArgs {
  const float* logprobs;
  const int64_t* cu_seqlens;  // (2 * pairs + 1,)
  const float* ref_logprobs;
  const int64_t* lengths;
  PairLoss loss;
  float beta;
  float label_smoothing;
  float discopop_tau;
  float* losses;             // (pairs,)
  float* sequence_logprobs;  // (2 * pairs,)
  float* gradients;          // (2 * pairs,)
};

struct PairLossBackwardArgs {
  const float* gradients;
  const int64_t* cu_seqlens;
  const float* grad_losses;  // or null
  int64_t grad_losses_stride;
  const float* grad_sequence_logprobs;  // or null
  int64_t grad_sequence_logprobs_stride;
  float* out;  // (N,)
};

struct PolicyLossArgs {
  const float* logprobs;
  const float* old_logprobs;  // or null
  const float* ref_logprobs;  // or null
  const float* advantages;
  const int64_t* branch;
  const float* weights;
  int64_t num_tokens;
  PolicyLoss loss;
  int64_t bias_correct_kl;
  float beta;
  float lower;
  float upper;
  float delta;
  float temperature_pos;
  float temperature_neg;
  float max_log_ratio;
  float* partial_sums;  // (policy_loss_blocks(num_tokens),)
  float* kl;            // (N,), null without a reference
  int8_t* clipped;
  float* gradients;
};

// Returns the number of partial sums that the loss of so many tokens has.
constexpr int64_t policy_loss_blocks(int64_t num_tokens) {
  return (num_tokens + kPolicyLossBlock - 1) / kPolicyLossBlock;
}

namespace cuda {

// The launchers enqueue work on `stream` and return; they throw std::runtime_error if the launch is refused.
void launch_pair_loss(const PairLossArgs& args, int64_t pairs, CUstream_st* stream);
void launch_pair_loss_backward(const PairLossBackwardArgs& args, int64_t pairs, int64_t num_tokens,
                               CUstream_st* stream);
void launch_policy_loss(const PolicyLossArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace trl_fast
