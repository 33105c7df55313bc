// Registers the fused kernel of the head, where it was built (with CUTLASS), and the kernel that merges its parts, as
// torch.ops.trl_fast.*; trl_fast/ops/head/cutlass_scores.py calls them.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <bit>
#include <limits>

#include "cuda/tile_scores.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

void check_state(const at::Tensor& state, int64_t rows, at::Device device) {
  check_rows(state, "state", device);
  TORCH_CHECK_VALUE(state.size(0) == kNumStates && state.size(1) == rows && state.scalar_type() == at::kDouble,
                    "state: expected float64 of shape (", static_cast<int>(kNumStates), ", ", rows, "), got ",
                    state.sizes(), " ", state.scalar_type());
}

Parts parts_of(const at::Tensor& parts, int64_t outputs, int64_t num_parts, int64_t rows, at::Device device) {
  const int64_t slots = 2 + std::popcount(static_cast<uint64_t>(outputs));
  check_device(parts, "parts", device);
  TORCH_CHECK_VALUE(parts.dim() == 3 && parts.size(0) == slots && parts.size(1) >= num_parts &&
                        parts.size(2) == rows && (rows <= 1 || parts.stride(2) == 1) &&
                        parts.scalar_type() == at::kFloat,
                    "parts: expected float32 of shape (", slots, ", at least ", num_parts, ", ", rows, "), got ",
                    parts.sizes(), " ", parts.scalar_type());
  return {parts.mutable_data_ptr<float>(), parts.stride(0), parts.stride(1)};
}

#ifdef TRL_FAST_HAS_CUTLASS

constexpr int64_t kAlignment = 8;  // of 16-bit numbers: TMA takes rows of multiples of 16 bytes

void check_aligned(const at::Tensor& matrix, const char* name, at::Device device) {
  check_rows(matrix, name, device);
  TORCH_CHECK_VALUE(matrix.stride(0) * matrix.element_size() % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0,
                    name, ": expected rows that begin at multiples of 16 bytes, got strides ", matrix.strides());
  TORCH_CHECK_VALUE(matrix.size(0) <= std::numeric_limits<int>::max(), name, ": too many rows, ", matrix.sizes());
}

void fused_scores(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                  const std::optional<at::Tensor>& bias, double scale, double softcap, double inv_temperature,
                  int64_t outputs, at::Tensor parts, at::Tensor state, const std::optional<at::Tensor>& kept) {
  const at::Device device = hidden.device();
  const int64_t rows = hidden.size(0), columns = weight.size(0);
  check_aligned(hidden, "hidden", device);
  check_aligned(weight, "weight", device);
  const Dtype dtype = dtype_of(hidden, "hidden");
  TORCH_CHECK_VALUE(dtype != Dtype::kFloat32 && weight.scalar_type() == hidden.scalar_type() &&
                        weight.size(1) == hidden.size(1) && hidden.size(1) % kAlignment == 0,
                    "weight: expected rows of ", hidden.size(1), " numbers, a multiple of ", kAlignment,
                    ", both factors bfloat16 or float16, got ", hidden.scalar_type(), " and ", weight.sizes(), " ",
                    weight.scalar_type());
  check_vector(targets, "targets", rows, at::kLong, device);
  const at::Tensor dense_targets = targets.contiguous();
  at::Tensor dense_bias;
  if (bias) {
    check_device(*bias, "bias", device);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == columns, "bias: expected shape (", columns, ",), got ",
                      bias->sizes());
    dense_bias = bias->to(at::kFloat).contiguous();
  }
  check_state(state, rows, device);
  TileScoreArgs args = {dense_targets.const_data_ptr<int64_t>(),
                        transform_of(dense_bias, scale, softcap, inv_temperature),
                        outputs,
                        static_cast<int>(rows),
                        static_cast<int>(columns),
                        parts_of(parts, outputs, (columns + kPartColumns - 1) / kPartColumns, rows, device),
                        state.mutable_data_ptr<double>(),
                        state.stride(0),
                        nullptr,
                        nullptr,
                        0};
  if (kept) {
    const bool packed = kept->scalar_type() == at::kShort;
    check_aligned(*kept, "kept", device);
    TORCH_CHECK_VALUE(
        kept->size(0) == rows && kept->size(1) == columns && (packed || kept->scalar_type() == at::kFloat),
        "kept: expected int16 or float32 of shape (", rows, ", ", columns, "), got ", kept->sizes(), " ",
        kept->scalar_type());
    if (packed) {
      args.words = static_cast<uint16_t*>(kept->mutable_data_ptr());
    } else {
      args.raw = kept->mutable_data_ptr<float>();
    }
    args.kept_stride = kept->stride(0);
  }
  const FusedFactors factors = {
      dtype, hidden.const_data_ptr(), hidden.stride(0), weight.const_data_ptr(), weight.stride(0), hidden.size(1)};
  const c10::cuda::CUDAGuard guard(device);
  cuda::launch_fused_scores(factors, args, c10::cuda::getCurrentCUDAStream());
}

#endif

void merge_parts(const at::Tensor& parts, int64_t outputs, at::Tensor state, const std::optional<at::Tensor>& tops) {
  const int64_t num_parts = parts.size(1), rows = parts.size(2);
  check_state(state, rows, parts.device());
  MergeArgs args = {parts_of(parts, outputs, num_parts, rows, parts.device()),
                    rows,
                    num_parts,
                    outputs,
                    state.mutable_data_ptr<double>(),
                    state.stride(0),
                    nullptr,
                    0};
  if (tops) {
    check_rows(*tops, "tops", parts.device());
    TORCH_CHECK_VALUE(tops->size(0) == rows && tops->size(1) == num_parts && tops->scalar_type() == at::kFloat,
                      "tops: expected float32 of shape (", rows, ", ", num_parts, "), got ", tops->sizes(), " ",
                      tops->scalar_type());
    args.tops = tops->mutable_data_ptr<float>();
    args.tops_stride = tops->stride(0);
  }
  const c10::cuda::CUDAGuard guard(parts.device());
  cuda::launch_merge_parts(args, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
#ifdef TRL_FAST_HAS_CUTLASS
  m.def(
      "fused_scores(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float scale, float softcap, "
      "float inv_temperature, int outputs, Tensor(a!) parts, Tensor(b!) state, Tensor(c!)? kept) -> ()");
#endif
  m.def("merge_parts(Tensor parts, int outputs, Tensor(a!) state, Tensor(b!)? tops) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) {
#ifdef TRL_FAST_HAS_CUTLASS
  m.impl("fused_scores", &fused_scores);
#endif
  m.impl("merge_parts", &merge_parts);
}

}  // namespace trl_fast
