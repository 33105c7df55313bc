// Chooses the instruction set at run time.
#if defined(TRL_FAST_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention_kernels.h"
#include "divergence_kernels.h"
#include "layer_kernels.h"
#include "product_kernels.h"
#include "row_kernels.h"
#include "sparse_kernels.h"

namespace trl_fast {

#ifdef TRL_FAST_HAS_DEFAULT
extern const RowKernels kRowKernelsDEFAULT;
extern const SparseKernels kSparseKernelsDEFAULT;
extern const DivergenceKernels kDivergenceKernelsDEFAULT;
extern const LayerKernels kLayerKernelsDEFAULT;
extern const ProductKernels kProductKernelsDEFAULT;
extern const AttentionKernels kAttentionKernelsDEFAULT;
#endif
#ifdef TRL_FAST_HAS_AVX2
extern const RowKernels kRowKernelsAVX2;
extern const SparseKernels kSparseKernelsAVX2;
extern const DivergenceKernels kDivergenceKernelsAVX2;
extern const LayerKernels kLayerKernelsAVX2;
extern const ProductKernels kProductKernelsAVX2;
extern const AttentionKernels kAttentionKernelsAVX2;
#endif
#ifdef TRL_FAST_HAS_AVX512
extern const RowKernels kRowKernelsAVX512;
extern const SparseKernels kSparseKernelsAVX512;
extern const DivergenceKernels kDivergenceKernelsAVX512;
extern const LayerKernels kLayerKernelsAVX512;
extern const ProductKernels kProductKernelsAVX512;
extern const AttentionKernels kAttentionKernelsAVX512;
#endif
#ifdef TRL_FAST_HAS_AMX
extern const AttentionKernels kAttentionKernelsAMX;
#endif
#ifdef TRL_FAST_HAS_EMULATED_AMX
extern const AttentionKernels kAttentionKernelsEMULATED_AMX;
#endif

namespace {

struct Candidate {
  const char* name;  // what TRL_FAST_CPU_ISA calls it
  const RowKernels* rows;
  const SparseKernels* sparse;
  const DivergenceKernels* divergence;
  const LayerKernels* layers;
  const ProductKernels* products;
  const AttentionKernels* attention;
  std::string (*why_not)();  // empty if it runs here
};

const char* const kLacking = "this CPU lacks it";

std::string why_not(bool runs) { return runs ? "" : kLacking; }

std::string runs_anywhere() { return ""; }

#ifdef TRL_FAST_HAS_AVX2
std::string why_not_avx2() {
  return why_not(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
}
#endif

#ifdef TRL_FAST_HAS_AVX512
std::string why_not_avx512() {
  return why_not(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("fma"));
}
#endif

#ifdef TRL_FAST_HAS_AMX
// Linux saves tiles for processes only that have asked for it; it refuses those with a small stack for signals.
std::string why_not_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (!why_not_avx512().empty() || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-tile") ||
      !__builtin_cpu_supports("amx-bf16")) {
    return kLacking;
  }
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("Linux does not let this process use its tiles: ") + std::strerror(errno);
#else
  return kLacking;
#endif
}
#endif

// Best first; those behind "default", which runs anywhere, are there for tests.
const Candidate kCandidates[] = {
#ifdef TRL_FAST_HAS_AMX
    {"amx", &kRowKernelsAVX512, &kSparseKernelsAVX512, &kDivergenceKernelsAVX512, &kLayerKernelsAVX512,
     &kProductKernelsAVX512, &kAttentionKernelsAMX, why_not_amx},
#endif
#ifdef TRL_FAST_HAS_AVX512
    {"avx512", &kRowKernelsAVX512, &kSparseKernelsAVX512, &kDivergenceKernelsAVX512, &kLayerKernelsAVX512,
     &kProductKernelsAVX512, &kAttentionKernelsAVX512, why_not_avx512},
#endif
#ifdef TRL_FAST_HAS_AVX2
    {"avx2", &kRowKernelsAVX2, &kSparseKernelsAVX2, &kDivergenceKernelsAVX2, &kLayerKernelsAVX2, &kProductKernelsAVX2,
     &kAttentionKernelsAVX2, why_not_avx2},
#endif
    {"default", &kRowKernelsDEFAULT, &kSparseKernelsDEFAULT, &kDivergenceKernelsDEFAULT, &kLayerKernelsDEFAULT,
     &kProductKernelsDEFAULT, &kAttentionKernelsDEFAULT, runs_anywhere},
#ifdef TRL_FAST_HAS_EMULATED_AMX
    {"emulated_amx", &kRowKernelsDEFAULT, &kSparseKernelsDEFAULT, &kDivergenceKernelsDEFAULT, &kLayerKernelsDEFAULT,
     &kProductKernelsDEFAULT, &kAttentionKernelsEMULATED_AMX, runs_anywhere},
#endif
};

struct Choice {
  const Candidate* candidate;
  std::string refused;  // the better one that the CPU has but this process may not use, and why
};

Choice choose() {
  const char* forced = std::getenv("TRL_FAST_CPU_ISA");
  std::string refused;
  for (const Candidate& candidate : kCandidates) {
    if (forced && *forced && std::string(forced) != candidate.name) continue;
    const std::string reason = candidate.why_not();
    if (reason.empty()) return {&candidate, refused};
    if (forced && *forced) throw std::runtime_error(std::string("TRL_FAST_CPU_ISA=") + forced + ": " + reason);
    if (reason != kLacking) refused = std::string(candidate.name) + ": " + reason;
  }
  throw std::runtime_error(std::string("TRL_FAST_CPU_ISA=") + forced + ": unknown or not compiled; compiled are " +
                           compiled_isas());
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

const Candidate& chosen() { return *choice().candidate; }

}  // namespace

const RowKernels& row_kernels() { return *chosen().rows; }

const SparseKernels& sparse_kernels() { return *chosen().sparse; }

const DivergenceKernels& divergence_kernels() { return *chosen().divergence; }

const LayerKernels& layer_kernels() { return *chosen().layers; }

const ProductKernels& product_kernels() { return *chosen().products; }

const AttentionKernels& attention_kernels() { return *chosen().attention; }

const char* chosen_isa() { return chosen().name; }

const char* refused_isa() { return choice().refused.c_str(); }

const char* compiled_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Candidate& candidate : kCandidates) joined += (joined.empty() ? "" : ",") + std::string(candidate.name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace trl_fast
