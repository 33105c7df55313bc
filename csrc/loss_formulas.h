// Names the formulas of the loss kernels. Python asks for a formula by its name and gets its number from the
// extension: the order of the numbers means nothing.
#pragma once

#include <cstdint>

namespace trl_fast {

// trl_fast/ops/pair_formulas.py has the formulas.
enum class PairLoss : int64_t {
  kSigmoid,
  kSigmoidNorm,
  kRobust,
  kHinge,
  kIpo,
  kExoPair,
  kDiscopop,
  kNcaPair,
  kBcoPair,
  kSppoHard,
  kApoZero,
  kApoDown,
};

// trl_fast/ops/policy_loss.py has the formulas.
enum class PolicyLoss : int64_t { kClip, kCispo, kSapo };

// Tokens whose terms one block of the policy loss's kernel sums.
constexpr int64_t kPolicyLossBlock = 1024;

template <typename Loss>
struct NamedFormula {
  const char* name;
  Loss loss;
};

constexpr NamedFormula<PairLoss> kPairFormulas[] = {
    {"sigmoid", PairLoss::kSigmoid},   {"sigmoid_norm", PairLoss::kSigmoidNorm},
    {"robust", PairLoss::kRobust},     {"hinge", PairLoss::kHinge},
    {"ipo", PairLoss::kIpo},           {"exo_pair", PairLoss::kExoPair},
    {"discopop", PairLoss::kDiscopop}, {"nca_pair", PairLoss::kNcaPair},
    {"bco_pair", PairLoss::kBcoPair},  {"sppo_hard", PairLoss::kSppoHard},
    {"apo_zero", PairLoss::kApoZero},  {"apo_down", PairLoss::kApoDown},
};

constexpr NamedFormula<PolicyLoss> kPolicyFormulas[] = {
    {"clip", PolicyLoss::kClip},
    {"cispo", PolicyLoss::kCispo},
    {"sapo", PolicyLoss::kSapo},
};

}  // namespace trl_fast
