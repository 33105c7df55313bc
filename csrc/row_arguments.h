// Makes the row kernels' arguments from the tensors of torch.ops.trl_fast.row_scores, row_grad and their packed forms.
// Every check names the tensor that fails it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "packed_logits.h"
#include "row_types.h"

namespace trl_fast {

inline Dtype dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, name, ": expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline void check_device(const at::Tensor& tensor, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, ": expected a tensor on ", device, ", got one on ",
                    tensor.device());
}

inline void check_vector(const at::Tensor& tensor, const char* name, int64_t size, at::ScalarType dtype,
                         at::Device device) {
  check_device(tensor, name, device);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected shape (", size, ",), got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", got ", tensor.scalar_type());
}

inline void check_rows(const at::Tensor& tensor, const char* name, at::Device device) {
  check_device(tensor, name, device);
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, ": expected shape (R, C), got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name,
                    ": expected contiguous rows, got strides ", tensor.strides());
}

// What would become 0 or infinite in float32 is refused by name: a softcap of 0 would mean none.
inline float float_of(double number, const char* name) {
  const float rounded = static_cast<float>(number);
  TORCH_CHECK_VALUE(std::isfinite(rounded) && (number == 0 || std::isnormal(rounded)), name,
                    ": expected a number that float32 has, between 1.2e-38 and 3.4e38, got ", number);
  return rounded;
}

inline Transform transform_of(const at::Tensor& bias, double scale, double softcap, double inv_temperature) {
  return {bias.defined() ? bias.const_data_ptr<float>() : nullptr, float_of(scale, "scale"),
          float_of(softcap, "softcap"), float_of(inv_temperature, "inv_temperature")};
}

// Holds a tile and a transform, and the tensors that both point into: what had to be made contiguous or float.
struct RowInputs {
  at::Tensor targets;
  at::Tensor bias;
  LogitTile tile;
  Transform transform;
};

inline RowInputs row_inputs(at::DeviceType device_type, const at::Tensor& logits, const at::Tensor& targets,
                            const std::optional<at::Tensor>& bias, double scale, double softcap,
                            double inv_temperature, int64_t column_offset) {
  TORCH_CHECK_VALUE(logits.device().type() == device_type, "logits: expected a tensor on ", device_type,
                    ", got one on ", logits.device());
  check_rows(logits, "logits", logits.device());
  check_vector(targets, "targets", logits.size(0), at::kLong, logits.device());
  RowInputs in;
  in.targets = targets.contiguous();
  if (bias) {
    check_vector(*bias, "bias", logits.size(1), bias->scalar_type(), logits.device());
    in.bias = bias->to(at::kFloat).contiguous();
  }
  in.tile = {logits.const_data_ptr(), dtype_of(logits, "logits"),           logits.stride(0),
             logits.size(1),          in.targets.const_data_ptr<int64_t>(), column_offset};
  in.transform = transform_of(in.bias, scale, softcap, inv_temperature);
  return in;
}

inline ScoreArgs score_args(const RowInputs& in, const at::Tensor& logits, int64_t outputs, at::Tensor& state) {
  const int64_t rows = logits.size(0);
  check_device(state, "state", logits.device());
  TORCH_CHECK_VALUE(state.dim() == 2 && state.size(0) == kNumStates && state.size(1) == rows &&
                        (rows <= 1 || state.stride(1) == 1) && state.scalar_type() == at::kDouble,
                    "state: expected a float64 tensor of shape (", static_cast<int>(kNumStates), ", ", rows,
                    ") with contiguous rows, got ", state.sizes(), " ", state.scalar_type());
  return {in.tile, in.transform, outputs, state.mutable_data_ptr<double>(), state.stride(0), nullptr, 0};
}

inline void check_out(const at::Tensor& out, const at::Tensor& logits) {
  check_rows(out, "out", logits.device());
  // CUDA kernels also write narrow gradients of float32 logits.
  const bool dtype_serves = out.scalar_type() == logits.scalar_type() ||
                            (logits.is_cuda() && logits.scalar_type() == at::kFloat && out.is_floating_point());
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes() && dtype_serves, "out: expected shape and dtype of logits, ",
                    logits.sizes(), " ", logits.scalar_type(), ", got ", out.sizes(), " ", out.scalar_type());
}

// `lse` has to be contiguous.
inline GradArgs grad_args(const RowInputs& in, const at::Tensor& logits, const at::Tensor& lse,
                          const at::Tensor& coefficients, at::Tensor& out) {
  const int64_t rows = logits.size(0);
  check_out(out, logits);
  check_vector(lse, "lse", rows, at::kFloat, logits.device());
  check_device(coefficients, "coefficients", logits.device());
  TORCH_CHECK_VALUE(coefficients.dim() == 2 && coefficients.size(0) == kNumCoefficients &&
                        coefficients.size(1) == rows && coefficients.is_contiguous() &&
                        coefficients.scalar_type() == at::kFloat,
                    "coefficients: expected a contiguous float32 tensor of shape (", kNumCoefficients, ", ", rows,
                    "), got ", coefficients.sizes(), " ", coefficients.scalar_type());
  return {in.tile,
          in.transform,
          lse.const_data_ptr<float>(),
          coefficients.const_data_ptr<float>(),
          rows,
          out.mutable_data_ptr(),
          out.stride(0),
          dtype_of(out, "out")};
}

// Packed logits of so many columns.
inline PackedRows packed_rows(const at::Tensor& words, const at::Tensor& tops, int64_t columns, at::Device device) {
  check_rows(words, "words", device);
  TORCH_CHECK_VALUE(words.scalar_type() == at::kShort, "words: expected int16, got ", words.scalar_type());
  TORCH_CHECK_VALUE(words.size(1) >= columns, "words: expected at least ", columns, " a row, got ", words.sizes());
  check_rows(tops, "tops", device);
  TORCH_CHECK_VALUE(
      tops.scalar_type() == at::kFloat && tops.size(0) == words.size(0) && tops.size(1) >= num_chunks(columns),
      "tops: expected float32 of shape (", words.size(0), ", ", num_chunks(columns), ") for ", columns,
      " columns, got ", tops.sizes(), " ", tops.scalar_type());
  const PackedRow first = {static_cast<uint16_t*>(words.data_ptr()), static_cast<float*>(tops.data_ptr())};
  return {first, words.stride(0), tops.stride(0), nullptr};
}

inline void check_packed_rows(const at::Tensor& words, int64_t rows) {
  TORCH_CHECK_VALUE(words.size(0) == rows, "words: expected ", rows, " rows, got ", words.sizes());
}

// The rows `index` (R,) in dense form, if there are such; `out` (R, C) may lie where the words lie only without them.
inline at::Tensor packed_index(const at::Tensor& words, const std::optional<at::Tensor>& index,
                               const at::Tensor& out) {
  if (!index) check_packed_rows(words, out.size(0));
  const bool in_place = out.const_data_ptr() == words.const_data_ptr() && out.numel() > 0;
  TORCH_CHECK_VALUE(!in_place || (!index && out.element_size() == words.element_size() &&
                                  (out.size(0) <= 1 || out.stride(0) == words.stride(0))),
                    "out: only a 16-bit gradient of all rows, with the words' stride, may take the words' place");
  if (!index) return {};
  check_vector(*index, "index", out.size(0), at::kLong, out.device());
  return index->contiguous();
}

}  // namespace trl_fast
