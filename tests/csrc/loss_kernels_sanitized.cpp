// Runs the CUDA loss kernels under a sanitizer, on heap buffers of exactly the size that they may touch; argv[1] is a
// number of tokens by which the last sequence ends behind them.
#include <cstdio>
#include <cstdlib>

#include "support/simt.h"

#ifdef TRL_FAST_PLANT_MISSING_BARRIER
// Only the second barrier of a sum is left: the next sum overwrites what this one still reads.
#define __syncthreads() \
  if (__COUNTER__ % 2) simt::wait_at_barrier()
#endif
#include "cuda/loss_kernels.cuh"

using namespace trl_fast;

namespace {

constexpr int64_t kPairs = 3, kSequences = 2 * kPairs, kTokens = 2051;

void run_kernels(unsigned seed, int64_t excess_tokens) {
  const std::vector<int64_t> cu_seqlens = {0, 700, 700, 701, 1500, 1800, kTokens + excess_tokens};
  const std::vector<int64_t> lengths(kSequences, 5);
  const std::vector<float> logprobs(kTokens, -0.5f), ref_logprobs(kSequences, -300.0f), upstream(kSequences, 1.0f);
  std::vector<float> losses(kPairs), sequence_logprobs(kSequences), gradients(kSequences), out(kTokens);
  PairLossArgs forward = {};
  forward.logprobs = logprobs.data();
  forward.cu_seqlens = cu_seqlens.data();
  forward.ref_logprobs = ref_logprobs.data();
  forward.lengths = lengths.data();
  forward.beta = 0.1f;
  forward.losses = losses.data();
  forward.sequence_logprobs = sequence_logprobs.data();
  forward.gradients = gradients.data();
  dispatch_pair_loss(kPairs,
                     [&](auto kernel, dim3 grid) { simt::launch(grid, kThreads, seed, [&] { kernel(forward); }); });
  const PairLossBackwardArgs backward = {gradients.data(), cu_seqlens.data(), upstream.data(), 1, upstream.data(), 1,
                                         out.data()};
  dispatch_pair_loss_backward(
      kPairs, kTokens, [&](auto kernel, dim3 grid) { simt::launch(grid, kThreads, seed, [&] { kernel(backward); }); });
}

void run_policy(unsigned seed, int64_t excess_tokens) {
  const std::vector<int64_t> branch(kTokens, kSequences - 1);
  const std::vector<float> logprobs(kTokens, -0.5f), others(kTokens, -0.7f), of_sequence(kSequences, 1.0f);
  std::vector<float> partial_sums(policy_loss_blocks(kTokens)), kl(kTokens), gradients(kTokens);
  std::vector<int8_t> clipped(kTokens);
  PolicyLossArgs args = {};
  args.logprobs = logprobs.data();
  args.old_logprobs = args.ref_logprobs = others.data();
  args.advantages = args.weights = of_sequence.data();
  args.branch = branch.data();
  args.num_tokens = kTokens + excess_tokens;
  args.beta = args.upper = args.delta = args.max_log_ratio = 1.0f;
  args.partial_sums = partial_sums.data();
  args.kl = kl.data();
  args.clipped = clipped.data();
  args.gradients = gradients.data();
  dispatch_policy_loss(args.num_tokens,
                       [&](auto kernel, dim3 grid) { simt::launch(grid, kThreads, seed, [&] { kernel(args); }); });
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t excess_pair = argc > 1 ? std::atoi(argv[1]) : 0, excess_policy = argc > 2 ? std::atoi(argv[2]) : 0;
  for (unsigned seed = 0; seed < 3; ++seed) {
    run_kernels(seed, excess_pair);
    run_policy(seed, excess_policy);
  }
  std::puts("finished");
}
