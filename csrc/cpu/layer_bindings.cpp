// Registers the norms, gated activations and embeddings of layers as torch.ops.trl_fast.*; trl_fast/ops/layers calls
// them and specifies them.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/layer_kernels.h"
#include "layer_arguments.h"

namespace trl_fast {
namespace {

void layer_rms_norm(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, double eps,
                    int64_t cast, at::Tensor out, OptionalTensor sum, at::Tensor rstd) {
  const RowsOf x_rows(x), residual_rows(residual ? *residual : x);
  const NormArgs args = norm_forward_args(x, x_rows, residual, residual_rows, weight, eps, cast, out, sum, rstd);
  const int64_t rows_a_task = std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, x.size(-1)));
  at::parallel_for(0, args.rows, rows_a_task,
                   [&](int64_t begin, int64_t end) { layer_kernels().norm(args, begin, end); });
}

void layer_rms_norm_backward(const at::Tensor& grad, const OptionalTensor& grad_sum, const at::Tensor& x,
                             const OptionalTensor& weight, const at::Tensor& rstd, int64_t cast, OptionalTensor grad_x,
                             OptionalTensor partials) {
  const RowsOf x_rows(x), grad_rows(grad), sum_rows(grad_sum ? *grad_sum : x);
  NormArgs args = norm_backward_args(grad, grad_rows, grad_sum, sum_rows, x, x_rows, weight, rstd, cast, grad_x);
  const int64_t blocks = (args.rows + kNormBlock - 1) / kNormBlock;
  args.partials = partial_sums(partials, blocks, x.size(-1), x.device());
  const int64_t block_size = std::max<int64_t>(1, kNormBlock * x.size(-1));
  at::parallel_for(0, blocks, std::max<int64_t>(1, at::internal::GRAIN_SIZE / block_size),
                   [&](int64_t begin, int64_t end) { layer_kernels().norm_backward(args, begin, end); });
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
  const GateArgs args = gate_backward_args(grad, gate, up, activation, grad_gate, grad_up);
  at::parallel_for(0, gate.numel(), at::internal::GRAIN_SIZE / 4,
                   [&](int64_t begin, int64_t end) { layer_kernels().gate_backward(args, begin, end); });
}

void layer_embedding_gradient(const at::Tensor& grad, const at::Tensor& order, const at::Tensor& offsets,
                              const at::Tensor& tokens, bool adds, at::Tensor out) {
  check_dense(grad, "grad", grad);
  check_rows(grad, "grad", at::kCPU);
  check_rows(out, "out", at::kCPU);
  TORCH_CHECK_VALUE(out.size(1) == grad.size(1) && out.is_contiguous() && out.scalar_type() == grad.scalar_type(),
                    "out: expected contiguous rows of ", grad.scalar_type(), " as long as those of grad");
  const int64_t groups = offsets.numel() - 1;
  check_vector(order, "order", order.numel(), at::kLong, at::kCPU);
  check_vector(offsets, "offsets", groups + 1, at::kLong, at::kCPU);
  check_vector(tokens, "tokens", groups, at::kLong, at::kCPU);
  const bool is_dense = order.is_contiguous() && offsets.is_contiguous() && tokens.is_contiguous();
  TORCH_CHECK_VALUE(is_dense && groups >= 0,
                    "order, offsets, tokens: expected contiguous tensors, one group at least");
  TORCH_CHECK_VALUE(out.size(0) >= groups, "out: expected a row for each of ", groups, " groups at least");
  if (groups == 0) {
    if (!adds) out.zero_();
    return;
  }
  EmbeddingArgs args = {};
  args.grad = grad.const_data_ptr();
  args.dtype = dtype_of(grad, "grad");
  args.columns = grad.size(1);
  args.order = order.const_data_ptr<int64_t>();
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.tokens = tokens.const_data_ptr<int64_t>();
  args.groups = groups;
  args.adds = adds;
  args.rows = out.size(0);
  args.out = out.mutable_data_ptr();
  const int64_t a_group = std::max<int64_t>(1, std::max(grad.numel(), adds ? 0 : out.numel()) / groups);
  at::parallel_for(0, groups, std::max<int64_t>(1, at::internal::GRAIN_SIZE / a_group),
                   [&](int64_t begin, int64_t end) { layer_kernels().embedding_gradient(args, begin, end); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "layer_rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, int cast, Tensor(a!) out, "
      "Tensor(b!)? sum, Tensor(c!) rstd) -> ()");
  m.def(
      "layer_rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? weight, Tensor rstd, int cast, "
      "Tensor(a!)? grad_x, Tensor(b!)? partials) -> ()");
  m.def("layer_gated_activation(Tensor gate, Tensor up, int activation, Tensor(a!) out) -> ()");
  m.def(
      "layer_gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int activation, Tensor(a!) grad_gate, "
      "Tensor(b!) grad_up) -> ()");
  m.def(
      "layer_embedding_gradient(Tensor grad, Tensor order, Tensor offsets, Tensor tokens, bool adds, Tensor(a!) out) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("layer_rms_norm", &layer_rms_norm);
  m.impl("layer_rms_norm_backward", &layer_rms_norm_backward);
  m.impl("layer_gated_activation", &layer_gated_activation);
  m.impl("layer_gated_activation_backward", &layer_gated_activation_backward);
  m.impl("layer_embedding_gradient", &layer_embedding_gradient);
}

}  // namespace trl_fast
