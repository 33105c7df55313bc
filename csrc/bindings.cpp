// Registers the schemas of the ops that CPU and CUDA kernels serve, and tells Python how the extension was built and
// which constants and loss formulas it was compiled with.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/layer_kernels.h"
#include "cpu/memory_pool.h"
#include "cpu/row_kernels.h"
#include "cpu/tensor_heap.h"
#include "cuda/tile_scores.h"
#include "loss_formulas.h"
#include "packed_logits.h"
#include "row_types.h"

namespace trl_fast {
namespace {

// Returns how many threads share the rows of a large enough tile.
int64_t row_threads() {
  const int64_t tasks = at::get_num_threads();
  std::vector<char> seen(tasks, 0);
  at::parallel_for(0, tasks, 1, [&](int64_t, int64_t) { seen[at::get_thread_num()] = 1; });
  return std::count(seen.begin(), seen.end(), 1);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["isas"] = compiled_isas();
  info["isa"] = chosen_isa();
  info["refused_isa"] = refused_isa();
  info["row_threads"] = row_threads();
  info["compiler"] = __VERSION__;
  info["torch_version"] = TORCH_VERSION;
#ifdef TRL_FAST_HAS_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

// Returns names in the order of their numbers, 0 and on.
template <typename Enum>
pybind11::tuple by_number(std::initializer_list<std::pair<Enum, const char*>> names) {
  pybind11::tuple ordered(names.size());
  for (const auto& [number, name] : names) ordered[static_cast<size_t>(number)] = name;
  return ordered;
}

// Returns the constants that kernels/shared_constants.py has under the same names. trl_fast/ops/backends.py compares
// them when it loads the extension.
pybind11::dict shared_constants() {
  pybind11::dict constants;
  constants["ENTROPY"] = static_cast<int64_t>(kEntropy);
  constants["LOG_SUM_SQ_PROBS"] = static_cast<int64_t>(kLogSumSqProbs);
  constants["MEAN_LOGITS"] = static_cast<int64_t>(kMeanLogits);
  constants["IS_TOP1"] = static_cast<int64_t>(kIsTop1);
  constants["TOP"] = static_cast<int>(kTop);
  constants["SUM"] = static_cast<int>(kSum);
  constants["SUM_X"] = static_cast<int>(kSumX);
  constants["SUM_SQ"] = static_cast<int>(kSumSq);
  constants["TOTAL"] = static_cast<int>(kTotal);
  constants["TARGET"] = static_cast<int>(kTarget);
  constants["BEFORE"] = static_cast<int>(kBefore);
  constants["NUM_STATES"] = static_cast<int>(kNumStates);
  constants["NUM_COEFFICIENTS"] = kNumCoefficients;
  constants["PACKED_CHUNK"] = kPackedChunk;
  constants["PACKED_STEPS_A_NAT"] = kPackedSteps;
  constants["PACKED_LOWEST_CODE"] = kLowestCode;
  constants["PACKED_MINUS_INF_CODE"] = kMinusInfCode;
  constants["POLICY_LOSS_BLOCK"] = kPolicyLossBlock;
  constants["NORM_CASTS"] =
      by_number<NormCast>({{NormCast::kLlama, "llama"}, {NormCast::kGemma, "gemma"}, {NormCast::kOlmo, "olmo"}});
  constants["ACTIVATIONS"] = by_number<Activation>(
      {{Activation::kSilu, "silu"}, {Activation::kGeluTanh, "gelu_tanh"}, {Activation::kGelu, "gelu"}});
  constants["PAIRS"] = by_number<Pairs>(
      {{Pairs::kHalves, "halves"}, {Pairs::kAdjacent, "adjacent"}, {Pairs::kAdjacentToHalves, "adjacent_to_halves"}});
  constants["NORM_BLOCK"] = kNormBlock;
  constants["TOKEN_BLOCK"] = kTokenBlock;
  constants["FEWEST_WORKERS"] = kFewestWorkers;
  constants["NUMBERS_OF_WORKERS"] = kNumbersOfWorkers;
  constants["POOLED_FROM_BYTES"] = kPooledFromBytes;
  constants["FUSED_ROWS"] = kFusedRows;
  constants["FUSED_PART_COLUMNS"] = kPartColumns;
  return constants;
}

template <typename Formulas>
pybind11::dict numbers_by_name(const Formulas& formulas) {
  pybind11::dict numbers;
  for (const auto& formula : formulas) numbers[formula.name] = static_cast<int64_t>(formula.loss);
  return numbers;
}

// Returns, for each op of a loss, the names and numbers of the formulas that its CUDA kernel has.
pybind11::dict loss_formulas() {
  pybind11::dict formulas;
  formulas["pair_loss"] = numbers_by_name(kPairFormulas);
  formulas["policy_loss"] = numbers_by_name(kPolicyFormulas);
  return formulas;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "row_scores(Tensor logits, Tensor targets, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "int outputs, int column_offset, Tensor(a!) state) -> ()");
  m.def(
      "row_grad(Tensor logits, Tensor targets, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "Tensor lse, Tensor coefficients, int column_offset, Tensor(a!) out) -> ()");
  m.def(
      "row_scores_packed(Tensor logits, Tensor targets, Tensor? bias, float scale, float inv_temperature, "
      "int outputs, int column_offset, Tensor(a!) state, Tensor(b!) words, Tensor(c!) tops) -> ()");
  m.def(
      "row_grad_packed(Tensor words, Tensor? index, Tensor targets, float scale, float inv_temperature, Tensor lse, "
      "Tensor coefficients, int column_offset, Tensor(a!) out, Tensor tops) -> ()");
  m.def(
      "row_divergence(Tensor student, Tensor? student_bias, float student_scale, float student_softcap, "
      "Tensor teacher, Tensor? teacher_bias, float teacher_scale, float teacher_softcap, float inv_temperature, "
      "float teacher_part, float student_part, float mixture, bool is_tvd, Tensor weights, Tensor(a!) results, "
      "Tensor(b!)? gradient) -> ()");
  m.def("merge_attention(Tensor out, Tensor lse, Tensor other, Tensor other_lse, Tensor place) -> (Tensor, Tensor)");
}

}  // namespace trl_fast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  trl_fast::install_cpu_allocator();
  m.def("build_info", &trl_fast::build_info, "Returns how the extension was built and the instruction set it runs.");
  m.def("shared_constants", &trl_fast::shared_constants, "Returns the constants that Python has too, by name.");
  m.def("loss_formulas", &trl_fast::loss_formulas, "Returns the loss formulas' numbers, by op and by name.");
  m.def("pool_free_bytes", &trl_fast::pool_free_bytes, "Returns the bytes of the memory pool's free blocks.");
  m.def("release_pool", &trl_fast::release_pool, "Frees the memory pool's free blocks; returns their bytes.");
  m.def("keep_freed", &trl_fast::keep_freed,
        "Makes large CPU tensors in the tensor heap from now on; returns whether it can.");
  m.def("give_back_freed", &trl_fast::give_back_freed, "Ends what keep_freed began.");
}
