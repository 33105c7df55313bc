// Registers the CUDA row kernels as torch.ops.trl_fast.*; csrc/bindings.cpp has their schemas.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/row_kernels.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

void check_size(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.size(0) <= cuda::kMaxRows && logits.size(1) <= cuda::kMaxColumns,
                    "logits: expected at most ", cuda::kMaxRows, " rows and ", cuda::kMaxColumns, " columns, got ",
                    logits.sizes());
}

void row_scores(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                double scale, double softcap, double inv_temperature, int64_t outputs, int64_t column_offset,
                at::Tensor state) {
  const RowInputs in = row_inputs(at::kCUDA, logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  check_size(logits);
  const ScoreArgs args = score_args(in, logits, outputs, state);
  const c10::cuda::CUDAGuard guard(logits.device());
  cuda::launch_row_scores(args, logits.size(0), c10::cuda::getCurrentCUDAStream());
}

void row_grad(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias, double scale,
              double softcap, double inv_temperature, const at::Tensor& lse, const at::Tensor& coefficients,
              int64_t column_offset, at::Tensor out) {
  const RowInputs in = row_inputs(at::kCUDA, logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  check_size(logits);
  const at::Tensor lse_dense = lse.contiguous();
  const GradArgs args = grad_args(in, logits, lse_dense, coefficients, out);
  const c10::cuda::CUDAGuard guard(logits.device());
  cuda::launch_row_grad(args, logits.size(0), c10::cuda::getCurrentCUDAStream());
}

void row_scores_packed(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                       double scale, double inv_temperature, int64_t outputs, int64_t column_offset, at::Tensor state,
                       const at::Tensor& words, const at::Tensor& tops) {
  const RowInputs in = row_inputs(at::kCUDA, logits, targets, bias, scale, 0, inv_temperature, column_offset);
  check_size(logits);
  TORCH_CHECK_VALUE(logits.scalar_type() == at::kFloat, "logits: expected float32, got ", logits.scalar_type());
  const PackedRows to = packed_rows(words, tops, logits.size(1), logits.device());
  check_packed_rows(words, logits.size(0));
  const ScoreArgs args = score_args(in, logits, outputs, state);
  const c10::cuda::CUDAGuard guard(logits.device());
  cuda::launch_row_scores_packed(args, to, logits.size(0), c10::cuda::getCurrentCUDAStream());
}

void row_grad_packed(const at::Tensor& words, const std::optional<at::Tensor>& index, const at::Tensor& targets,
                     double scale, double inv_temperature, const at::Tensor& lse, const at::Tensor& coefficients,
                     int64_t column_offset, at::Tensor out, const at::Tensor& tops) {
  const RowInputs in = row_inputs(at::kCUDA, out, targets, std::nullopt, scale, 0, inv_temperature, column_offset);
  check_size(out);
  PackedRows from = packed_rows(words, tops, out.size(1), out.device());
  const at::Tensor rows = packed_index(words, index, out);
  if (index) from.index = rows.const_data_ptr<int64_t>();
  const at::Tensor lse_dense = lse.contiguous();
  const GradArgs args = grad_args(in, out, lse_dense, coefficients, out);
  const c10::cuda::CUDAGuard guard(out.device());
  cuda::launch_row_grad_packed(args, from, out.size(0), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) {
  m.impl("row_scores", &row_scores);
  m.impl("row_grad", &row_grad);
  m.impl("row_scores_packed", &row_scores_packed);
  m.impl("row_grad_packed", &row_grad_packed);
}

}  // namespace trl_fast
