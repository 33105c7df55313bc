// Makes the divergence kernel's arguments from the tensors of torch.ops.trl_fast.row_divergence.
// Every check names the tensor that fails it.
#pragma once

#include "divergence_types.h"
#include "row_arguments.h"

namespace trl_fast {

// Holds the arguments, and the tensors that they point into: what had to be made contiguous or float.
struct DivergenceInputs {
  at::Tensor student_bias;
  at::Tensor teacher_bias;
  at::Tensor weights;
  DivergenceArgs args;
};

inline DivergenceSide divergence_side(at::DeviceType device_type, const at::Tensor& logits, const char* name,
                                      const std::optional<at::Tensor>& bias, const char* bias_name, double scale,
                                      double softcap, double inv_temperature, at::Tensor& kept_bias) {
  TORCH_CHECK_VALUE(logits.device().type() == device_type, name, ": expected a tensor on ", device_type,
                    ", got one on ", logits.device());
  check_rows(logits, name, logits.device());
  if (bias) {
    check_vector(*bias, bias_name, logits.size(1), bias->scalar_type(), logits.device());
    kept_bias = bias->to(at::kFloat).contiguous();
  }
  return {logits.const_data_ptr(), dtype_of(logits, name), logits.stride(0),
          transform_of(kept_bias, scale, softcap, inv_temperature)};
}

inline DivergenceNumbers divergence_numbers(double teacher_part, double student_part, double mixture, bool is_tvd) {
  TORCH_CHECK_VALUE(mixture >= 0 && mixture <= 1, "mixture: expected a number from 0 to 1, got ", mixture);
  return {static_cast<float>(teacher_part),
          static_cast<float>(student_part),
          static_cast<float>(mixture),
          static_cast<float>(1 - mixture),
          static_cast<float>(teacher_part * (1 - mixture) - student_part * mixture),
          is_tvd};
}

inline DivergenceInputs divergence_inputs(at::DeviceType device_type, const at::Tensor& student,
                                          const std::optional<at::Tensor>& student_bias, double student_scale,
                                          double student_softcap, const at::Tensor& teacher,
                                          const std::optional<at::Tensor>& teacher_bias, double teacher_scale,
                                          double teacher_softcap, double inv_temperature, double teacher_part,
                                          double student_part, double mixture, bool is_tvd, const at::Tensor& weights,
                                          at::Tensor& results, const std::optional<at::Tensor>& gradient) {
  DivergenceInputs in;
  const int64_t rows = student.size(0);
  DivergenceArgs& args = in.args;
  args.student = divergence_side(device_type, student, "student", student_bias, "student_bias", student_scale,
                                 student_softcap, inv_temperature, in.student_bias);
  args.teacher = divergence_side(device_type, teacher, "teacher", teacher_bias, "teacher_bias", teacher_scale,
                                 teacher_softcap, inv_temperature, in.teacher_bias);
  check_device(teacher, "teacher", student.device());
  TORCH_CHECK_VALUE(teacher.sizes() == student.sizes(), "teacher: expected the student's shape ", student.sizes(),
                    ", got ", teacher.sizes());
  args.columns = student.size(1);
  args.numbers = divergence_numbers(teacher_part, student_part, mixture, is_tvd);
  check_vector(weights, "weights", rows, at::kFloat, student.device());
  in.weights = weights.contiguous();
  args.weights = in.weights.const_data_ptr<float>();
  check_rows(results, "results", student.device());
  TORCH_CHECK_VALUE(
      results.scalar_type() == at::kFloat && results.size(0) == kNumDivergenceResults && results.size(1) == rows,
      "results: expected float32 of shape (", static_cast<int>(kNumDivergenceResults), ", ", rows, "), got ",
      results.sizes(), " ", results.scalar_type());
  args.results = results.mutable_data_ptr<float>();
  args.results_stride = results.stride(0);
  args.gradient = nullptr;
  args.gradient_stride = 0;
  args.gradient_dtype = args.student.dtype;
  if (gradient) {
    TORCH_CHECK_VALUE(gradient->sizes() == student.sizes(), "gradient: expected the student's shape ", student.sizes(),
                      ", got ", gradient->sizes());
    check_rows(*gradient, "gradient", student.device());
    args.gradient_dtype = dtype_of(*gradient, "gradient");
    TORCH_CHECK_VALUE(
        args.gradient_dtype == args.student.dtype || (student.is_cuda() && args.student.dtype == Dtype::kFloat32),
        "gradient: expected the student's dtype ", student.scalar_type(), ", got ", gradient->scalar_type());
    args.gradient = gradient->data_ptr();
    args.gradient_stride = gradient->stride(0);
  }
  return in;
}

}  // namespace trl_fast
