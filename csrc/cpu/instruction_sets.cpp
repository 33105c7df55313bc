// Chooses the instruction set at run time.
#if defined(TRL_FAST_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
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
  bool (*runs)();  // on this CPU
};

bool anywhere() { return true; }

#ifdef TRL_FAST_HAS_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef TRL_FAST_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
#endif

#ifdef TRL_FAST_HAS_AMX
// Linux saves tiles for processes only that have asked for it.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first; those behind "default", which runs anywhere, are there for tests.
const Candidate kCandidates[] = {
#ifdef TRL_FAST_HAS_AMX
    {"amx", &kRowKernelsAVX512, &kSparseKernelsAVX512, &kDivergenceKernelsAVX512, &kLayerKernelsAVX512,
     &kProductKernelsAVX512, &kAttentionKernelsAMX, has_amx},
#endif
#ifdef TRL_FAST_HAS_AVX512
    {"avx512", &kRowKernelsAVX512, &kSparseKernelsAVX512, &kDivergenceKernelsAVX512, &kLayerKernelsAVX512,
     &kProductKernelsAVX512, &kAttentionKernelsAVX512, has_avx512},
#endif
#ifdef TRL_FAST_HAS_AVX2
    {"avx2", &kRowKernelsAVX2, &kSparseKernelsAVX2, &kDivergenceKernelsAVX2, &kLayerKernelsAVX2, &kProductKernelsAVX2,
     &kAttentionKernelsAVX2, has_avx2},
#endif
    {"default", &kRowKernelsDEFAULT, &kSparseKernelsDEFAULT, &kDivergenceKernelsDEFAULT, &kLayerKernelsDEFAULT,
     &kProductKernelsDEFAULT, &kAttentionKernelsDEFAULT, anywhere},
#ifdef TRL_FAST_HAS_EMULATED_AMX
    {"emulated_amx", &kRowKernelsDEFAULT, &kSparseKernelsDEFAULT, &kDivergenceKernelsDEFAULT, &kLayerKernelsDEFAULT,
     &kProductKernelsDEFAULT, &kAttentionKernelsEMULATED_AMX, anywhere},
#endif
};

const Candidate& choose() {
  const char* forced = std::getenv("TRL_FAST_CPU_ISA");
  for (const Candidate& candidate : kCandidates) {
    if (forced && *forced) {
      if (std::string(forced) != candidate.name) continue;
      if (!candidate.runs())
        throw std::runtime_error(std::string("TRL_FAST_CPU_ISA=") + forced + ": this CPU lacks it");
      return candidate;
    }
    if (candidate.runs()) return candidate;
  }
  throw std::runtime_error(std::string("TRL_FAST_CPU_ISA=") + forced + ": unknown or not compiled; compiled are " +
                           compiled_isas());
}

const Candidate& chosen() {
  static const Candidate& candidate = choose();
  return candidate;
}

}  // namespace

const RowKernels& row_kernels() { return *chosen().rows; }

const SparseKernels& sparse_kernels() { return *chosen().sparse; }

const DivergenceKernels& divergence_kernels() { return *chosen().divergence; }

const LayerKernels& layer_kernels() { return *chosen().layers; }

const ProductKernels& product_kernels() { return *chosen().products; }

const AttentionKernels& attention_kernels() { return *chosen().attention; }

const char* chosen_isa() { return chosen().name; }

const char* compiled_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Candidate& candidate : kCandidates) joined += (joined.empty() ? "" : ",") + std::string(candidate.name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace trl_fast
