// Registers the CUDA kernels of layers as torch.ops.trl_fast.*; csrc/cpu/layer_bindings.cpp and
// layer_rotation_bindings.cpp have their schemas, and trl_fast/ops/layers specifies them.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/layer_kernels.h"
#include "layer_arguments.h"

namespace trl_fast {
namespace {

// A row of sums for each of so many workers; each has a row of its own at least.
int64_t workers_of(const OptionalTensor& partials, int64_t rows) {
  if (!partials) return rows;
  const int64_t workers = partials->size(0);
  TORCH_CHECK_VALUE(workers <= rows && (workers > 0 || rows == 0), "partials: expected sums of 1 to ", rows,
                    " workers, got ", partials->sizes());
  return workers;
}

void layer_rms_norm(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, double eps,
                    int64_t cast, at::Tensor out, OptionalTensor sum, at::Tensor rstd) {
  const RowsOf x_rows(x), residual_rows(residual ? *residual : x);
  const NormArgs args = norm_forward_args(x, x_rows, residual, residual_rows, weight, eps, cast, out, sum, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::launch_rms_norm(args, c10::cuda::getCurrentCUDAStream());
}

void layer_rms_norm_backward(const at::Tensor& grad, const OptionalTensor& grad_sum, const at::Tensor& x,
                             const OptionalTensor& weight, const at::Tensor& rstd, int64_t cast, OptionalTensor grad_x,
                             OptionalTensor partials) {
  const RowsOf x_rows(x), grad_rows(grad), sum_rows(grad_sum ? *grad_sum : x);
  NormArgs args = norm_backward_args(grad, grad_rows, grad_sum, sum_rows, x, x_rows, weight, rstd, cast, grad_x);
  const int64_t workers = workers_of(partials, args.rows);
  args.partials = partial_sums(partials, workers, args.weight.columns, x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::launch_rms_norm_backward(args, workers, c10::cuda::getCurrentCUDAStream());
}

void layer_gated_activation(const at::Tensor& gate, const at::Tensor& up, int64_t activation, at::Tensor out) {
  GateArgs args = gate_args(gate, up, activation);
  check_dense(out, "out", gate);
  args.out = out.mutable_data_ptr();
  const c10::cuda::CUDAGuard guard(gate.device());
  cuda::launch_gated_activation(args, gate.size(0), c10::cuda::getCurrentCUDAStream());
}

void layer_gated_activation_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                                     int64_t activation, at::Tensor grad_gate, at::Tensor grad_up) {
  const GateArgs args = gate_backward_args(grad, gate, up, activation, grad_gate, grad_up);
  const c10::cuda::CUDAGuard guard(gate.device());
  cuda::launch_gated_activation_backward(args, gate.size(0), c10::cuda::getCurrentCUDAStream());
}

int64_t heads_in(const at::Tensor& x) { return x.size(0) * x.size(1) * x.size(2); }

void layer_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t pairs,
                  bool one_angle_a_pair, bool upcast, bool is_backward, at::Tensor out) {
  const RotaryArgs args = rotary_args(x, turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, is_backward), out);
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::launch_rotary(args, heads_in(x), c10::cuda::getCurrentCUDAStream());
}

// A norm of all heads of a token has no kernel here.
void check_norm_of_head(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.numel() == x.size(3), "weight: expected ", x.size(3), " numbers, those of a head, got ",
                    weight.sizes());
}

void layer_norm_rotary(const at::Tensor& x, const at::Tensor& weight, double eps, int64_t cast, const at::Tensor& cos,
                       const at::Tensor& sin, int64_t pairs, bool one_angle_a_pair, bool upcast, at::Tensor out,
                       at::Tensor rstd) {
  check_norm_of_head(x, weight);
  NormRotaryArgs args = norm_rotary_args(x, weight, cast, rstd);
  args.turns = turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, false);
  args.eps = static_cast<float>(eps);
  check_by_tokens(out, "out", x);
  args.out = out.mutable_data_ptr();
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::launch_norm_rotary(args, heads_in(x), c10::cuda::getCurrentCUDAStream());
}

void layer_norm_rotary_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& rstd, int64_t cast, const at::Tensor& cos, const at::Tensor& sin,
                                int64_t pairs, bool one_angle_a_pair, bool upcast, OptionalTensor grad_x,
                                OptionalTensor partials) {
  check_norm_of_head(x, weight);
  NormRotaryArgs args = norm_rotary_backward_args(grad, x, weight, rstd, cast, grad_x);
  args.turns = turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, true);
  const int64_t rows = heads_in(x), workers = workers_of(partials, rows);
  args.partials = partial_sums(partials, workers, args.norm.columns, x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::launch_norm_rotary_backward(args, rows, workers, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) {
  m.impl("layer_rms_norm", &layer_rms_norm);
  m.impl("layer_rms_norm_backward", &layer_rms_norm_backward);
  m.impl("layer_gated_activation", &layer_gated_activation);
  m.impl("layer_gated_activation_backward", &layer_gated_activation_backward);
  m.impl("layer_rotary", &layer_rotary);
  m.impl("layer_norm_rotary", &layer_norm_rotary);
  m.impl("layer_norm_rotary_backward", &layer_norm_rotary_backward);
}

}  // namespace trl_fast
