// Declares the row kernels of the CPU as plain C++ functions: without torch headers, each instruction set is a small
// translation unit of its own.
//
// trl_fast/ops/head/row_kernels.py specifies what they compute.
#pragma once

#include "packed_logits.h"
#include "row_types.h"

namespace trl_fast {

// One instruction set's implementation; all work on rows [begin, end). Packed logits are those of float32 tiles,
// transformed and without a softcap: the block's pointer to logits is null where they are read.
struct RowKernels {
  void (*scores)(const ScoreArgs&, int64_t begin, int64_t end);
  void (*weights)(const ScoreArgs&, int64_t begin, int64_t end);
  void (*grad)(const GradArgs&, int64_t begin, int64_t end);
  void (*scores_packed)(const ScoreArgs&, const PackedRows&, int64_t begin, int64_t end);
  void (*grad_packed)(const GradArgs&, const PackedRows&, int64_t begin, int64_t end);
};

// The kernels for this machine: the best compiled instruction set that its CPU has, or the one that the environment
// variable TRL_FAST_CPU_ISA (default, avx2, avx512, amx) names. Throws std::runtime_error if that one cannot run.
const RowKernels& row_kernels();

// The name of the instruction set of row_kernels().
const char* chosen_isa();

// Which better one the CPU has but this process may not use, and why; empty if there is none.
const char* refused_isa();

// Names of the instruction sets that were compiled, separated by commas.
const char* compiled_isas();

}  // namespace trl_fast
