// Registers the CUDA kernel of divergences as torch.ops.trl_fast.row_divergence; csrc/bindings.cpp has its schema.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/divergence_kernels.h"
#include "cuda/row_kernels.h"
#include "divergence_arguments.h"

namespace trl_fast {
namespace {

void row_divergence(const at::Tensor& student, const std::optional<at::Tensor>& student_bias, double student_scale,
                    double student_softcap, const at::Tensor& teacher, const std::optional<at::Tensor>& teacher_bias,
                    double teacher_scale, double teacher_softcap, double inv_temperature, double teacher_part,
                    double student_part, double mixture, bool is_tvd, const at::Tensor& weights, at::Tensor results,
                    std::optional<at::Tensor> gradient) {
  const DivergenceInputs in = divergence_inputs(
      at::kCUDA, student, student_bias, student_scale, student_softcap, teacher, teacher_bias, teacher_scale,
      teacher_softcap, inv_temperature, teacher_part, student_part, mixture, is_tvd, weights, results, gradient);
  TORCH_CHECK_VALUE(student.size(0) <= cuda::kMaxRows && student.size(1) <= cuda::kMaxColumns,
                    "student: expected at most ", cuda::kMaxRows, " rows and ", cuda::kMaxColumns, " columns, got ",
                    student.sizes());
  for (const auto& [logits, name] : {std::pair(student, "student"), std::pair(teacher, "teacher")}) {
    TORCH_CHECK_VALUE(logits.scalar_type() == at::kFloat, name, ": expected float32, got ", logits.scalar_type());
  }
  const c10::cuda::CUDAGuard guard(student.device());
  cuda::launch_row_divergence(in.args, student.size(0), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) { m.impl("row_divergence", &row_divergence); }

}  // namespace trl_fast
