// The CUDA loss kernels as a host library with C functions, for test_cuda_losses.py.
#include <string>

#include "support/simt.h"

// After the vocabulary that the kernels are written in.
#include "cuda/loss_kernels.cuh"

using trl_fast::kThreads;

namespace {

template <typename Formulas>
int64_t number_of(const Formulas& formulas, const char* name) {
  for (const auto& formula : formulas) {
    if (std::string(formula.name) == name) return static_cast<int64_t>(formula.loss);
  }
  return -1;
}

}  // namespace

extern "C" {

int64_t pair_formula(const char* name) { return number_of(trl_fast::kPairFormulas, name); }

int64_t policy_formula(const char* name) { return number_of(trl_fast::kPolicyFormulas, name); }

void simt_pair_loss(const trl_fast::PairLossArgs* args, int64_t pairs, unsigned seed) {
  trl_fast::dispatch_pair_loss(
      pairs, [&](auto kernel, dim3 grid) { simt::launch(grid, kThreads, seed, [&] { kernel(*args); }); });
}

void simt_pair_loss_backward(const trl_fast::PairLossBackwardArgs* args, int64_t pairs, int64_t num_tokens,
                             unsigned seed) {
  trl_fast::dispatch_pair_loss_backward(
      pairs, num_tokens, [&](auto kernel, dim3 grid) { simt::launch(grid, kThreads, seed, [&] { kernel(*args); }); });
}

int64_t policy_loss_blocks(int64_t num_tokens) { return trl_fast::policy_loss_blocks(num_tokens); }

void simt_policy_loss(const trl_fast::PolicyLossArgs* args, unsigned seed) {
  trl_fast::dispatch_policy_loss(
      args->num_tokens, [&](auto kernel, dim3 grid) { simt::launch(grid, kThreads, seed, [&] { kernel(*args); }); });
}
}
