// Registers the CUDA row kernels as torch.ops.trl_fast.*; the schemas are in csrc/bindings.cpp.
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

}  // namespace

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) {
  m.impl("row_scores", &row_scores);
  m.impl("row_grad", &row_grad);
}

}  // namespace trl_fast
