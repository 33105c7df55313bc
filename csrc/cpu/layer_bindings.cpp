// Registers the kernels of layers as torch.ops.trl_fast.*; trl_fast/ops/layers calls them and specifies them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/layer_kernels.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

// Checks a tensor's shape, dtype and device against another's.
void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& as) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == as.sizes() && tensor.scalar_type() == as.scalar_type() && tensor.device().is_cpu(), name,
      ": expected ", as.scalar_type(), " of shape ", as.sizes(), " on the CPU, got ", tensor.scalar_type(), " ",
      tensor.sizes());
}

void check_dense(const at::Tensor& tensor, const char* name, const at::Tensor& as) {
  check_same(tensor, name, as);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

NormArgs norm_args(const at::Tensor& x, const at::Tensor& weight, double eps, bool is_gemma, const at::Tensor& rstd) {
  check_rows(x, "x", at::kCPU);
  check_vector(weight, "weight", x.size(1), x.scalar_type(), at::kCPU);
  check_vector(rstd, "rstd", x.size(0), at::kFloat, at::kCPU);
  TORCH_CHECK_VALUE(weight.is_contiguous() && rstd.is_contiguous(), "weight, rstd: expected contiguous tensors");
  NormArgs args = {};
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.weight = weight.const_data_ptr();
  args.dtype = dtype_of(x, "x");
  args.rows = x.size(0);
  args.columns = x.size(1);
  args.eps = static_cast<float>(eps);
  args.is_gemma = is_gemma;
  args.rstd = static_cast<float*>(rstd.data_ptr());
  return args;
}

void layer_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool is_gemma, at::Tensor out,
                    at::Tensor rstd) {
  NormArgs args = norm_args(x, weight, eps, is_gemma, rstd);
  check_dense(out, "out", x);
  args.out = out.mutable_data_ptr();
  const int64_t rows_a_task = std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, args.columns));
  at::parallel_for(0, args.rows, rows_a_task,
                   [&](int64_t begin, int64_t end) { layer_kernels().norm(args, begin, end); });
}

void layer_rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& rstd, bool is_gemma, std::optional<at::Tensor> grad_x,
                             std::optional<at::Tensor> partials) {
  NormArgs args = norm_args(x, weight, 0, is_gemma, rstd);
  check_rows(grad, "grad", at::kCPU);
  check_same(grad, "grad", x);
  args.grad = grad.const_data_ptr();
  args.grad_stride = grad.stride(0);
  if (grad_x) {
    check_dense(*grad_x, "grad_x", x);
    args.out = grad_x->mutable_data_ptr();
  }
  const int64_t blocks = (args.rows + kNormBlock - 1) / kNormBlock;
  if (partials) {
    TORCH_CHECK_VALUE(partials->sizes() == at::IntArrayRef({blocks, args.columns}) && partials->is_contiguous() &&
                          partials->scalar_type() == at::kFloat && partials->device().is_cpu(),
                      "partials: expected float32 of shape (", blocks, ", ", args.columns, "), got ",
                      partials->sizes());
    args.partials = partials->mutable_data_ptr<float>();
  }
  const int64_t block_size = std::max<int64_t>(1, kNormBlock * args.columns);
  at::parallel_for(0, blocks, std::max<int64_t>(1, at::internal::GRAIN_SIZE / block_size),
                   [&](int64_t begin, int64_t end) { layer_kernels().norm_backward(args, begin, end); });
}

GateArgs gate_args(const at::Tensor& gate, const at::Tensor& up, int64_t activation) {
  check_dense(gate, "gate", gate);
  check_dense(up, "up", gate);
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 2, "activation: expected 0, 1 or 2, got ", activation);
  GateArgs args = {};
  args.gate = gate.const_data_ptr();
  args.up = up.const_data_ptr();
  args.dtype = dtype_of(gate, "gate");
  args.activation = static_cast<Activation>(activation);
  return args;
}

void layer_gated_activation(const at::Tensor& gate, const at::Tensor& up, int64_t activation, at::Tensor out) {
  GateArgs args = gate_args(gate, up, activation);
  check_dense(out, "out", gate);
  args.out = out.mutable_data_ptr();
  at::parallel_for(0, gate.numel(), at::internal::GRAIN_SIZE / 4,
                   [&](int64_t begin, int64_t end) { layer_kernels().gate(args, begin, end); });
}

void layer_gated_activation_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                                     int64_t activation, at::Tensor grad_gate, at::Tensor grad_up) {
  GateArgs args = gate_args(gate, up, activation);
  check_dense(grad, "grad", gate);
  check_dense(grad_gate, "grad_gate", gate);
  check_dense(grad_up, "grad_up", gate);
  args.grad = grad.const_data_ptr();
  args.grad_gate = grad_gate.mutable_data_ptr();
  args.grad_up = grad_up.mutable_data_ptr();
  at::parallel_for(0, gate.numel(), at::internal::GRAIN_SIZE / 4,
                   [&](int64_t begin, int64_t end) { layer_kernels().gate_backward(args, begin, end); });
}

// Checks cos or sin of (B or 1, T, D), and writes the strides of B and T.
void check_turns(const at::Tensor& turns, const char* name, const at::Tensor& x, int64_t* strides) {
  const bool fits = turns.dim() == 3 && (turns.size(0) == 1 || turns.size(0) == x.size(0)) &&
                    turns.size(1) == x.size(2) && turns.size(2) == x.size(3) && turns.stride(2) == 1;
  TORCH_CHECK_VALUE(fits && turns.scalar_type() == x.scalar_type() && turns.device().is_cpu(), name, ": expected ",
                    x.scalar_type(), " of shape (", x.size(0), " or 1, ", x.size(2), ", ", x.size(3), "), got ",
                    turns.scalar_type(), " ", turns.sizes());
  strides[0] = turns.size(0) == 1 ? 0 : turns.stride(0);
  strides[1] = turns.stride(1);
}

void layer_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool is_backward,
                  at::Tensor out) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) % 2 == 0 && x.stride(3) == 1 && x.device().is_cpu(),
                    "x: expected a CPU tensor of shape (B, heads, T, even D) contiguous in D, got ", x.sizes());
  check_same(out, "out", x);
  TORCH_CHECK_VALUE(out.transpose(1, 2).is_contiguous(), "out: expected a view of a contiguous (B, T, heads, D)");
  RotaryArgs args = {};
  args.x = x.const_data_ptr();
  for (int i = 0; i < 3; ++i) args.x_strides[i] = x.stride(i);
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  check_turns(cos, "cos", x, args.cos_strides);
  check_turns(sin, "sin", x, args.sin_strides);
  args.out = out.mutable_data_ptr();
  args.dtype = dtype_of(x, "x");
  args.heads = x.size(1);
  args.tokens = x.size(2);
  args.width = x.size(3);
  args.is_backward = is_backward;
  const int64_t token_size = std::max<int64_t>(1, args.heads * args.width);
  at::parallel_for(0, x.size(0) * args.tokens, std::max<int64_t>(1, at::internal::GRAIN_SIZE / token_size),
                   [&](int64_t begin, int64_t end) { layer_kernels().rotary(args, begin, end); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def("layer_rms_norm(Tensor x, Tensor weight, float eps, bool is_gemma, Tensor(a!) out, Tensor(b!) rstd) -> ()");
  m.def(
      "layer_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool is_gemma, Tensor(a!)? grad_x, "
      "Tensor(b!)? partials) -> ()");
  m.def("layer_gated_activation(Tensor gate, Tensor up, int activation, Tensor(a!) out) -> ()");
  m.def(
      "layer_gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int activation, Tensor(a!) grad_gate, "
      "Tensor(b!) grad_up) -> ()");
  m.def("layer_rotary(Tensor x, Tensor cos, Tensor sin, bool is_backward, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("layer_rms_norm", &layer_rms_norm);
  m.impl("layer_rms_norm_backward", &layer_rms_norm_backward);
  m.impl("layer_gated_activation", &layer_gated_activation);
  m.impl("layer_gated_activation_backward", &layer_gated_activation_backward);
  m.impl("layer_rotary", &layer_rotary);
}

}  // namespace trl_fast
