// Registers the rotary embeddings of layers as torch.ops.trl_fast.*; trl_fast/ops/layers calls them and specifies
// them.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/layer_kernels.h"
#include "layer_arguments.h"

namespace trl_fast {
namespace {

// Calls f for tokens of all rows, or for blocks of them.
template <typename F>
void for_tokens(const at::Tensor& x, int64_t count, int64_t tokens_a_count, F f) {
  const int64_t size = std::max<int64_t>(1, x.size(1) * x.size(3) * tokens_a_count);
  at::parallel_for(0, count, std::max<int64_t>(1, at::internal::GRAIN_SIZE / size), f);
}

void layer_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t pairs,
                  bool one_angle_a_pair, bool upcast, bool is_backward, at::Tensor out) {
  const RotaryArgs args = rotary_args(x, turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, is_backward), out);
  for_tokens(x, x.size(0) * x.size(2), 1,
             [&](int64_t begin, int64_t end) { layer_kernels().rotary(args, begin, end); });
}

void layer_norm_rotary(const at::Tensor& x, const at::Tensor& weight, double eps, int64_t cast, const at::Tensor& cos,
                       const at::Tensor& sin, int64_t pairs, bool one_angle_a_pair, bool upcast, at::Tensor out,
                       at::Tensor rstd) {
  NormRotaryArgs args = norm_rotary_args(x, weight, cast, rstd);
  args.turns = turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, false);
  args.eps = static_cast<float>(eps);
  check_by_tokens(out, "out", x);
  args.out = out.mutable_data_ptr();
  for_tokens(x, x.size(0) * x.size(2), 1,
             [&](int64_t begin, int64_t end) { layer_kernels().norm_rotary(args, begin, end); });
}

void layer_norm_rotary_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& rstd, int64_t cast, const at::Tensor& cos, const at::Tensor& sin,
                                int64_t pairs, bool one_angle_a_pair, bool upcast, OptionalTensor grad_x,
                                OptionalTensor partials) {
  NormRotaryArgs args = norm_rotary_backward_args(grad, x, weight, rstd, cast, grad_x);
  args.turns = turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, true);
  const int64_t tokens = x.size(0) * x.size(2), blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  args.partials = partial_sums(partials, blocks, args.norm.columns, x.device());
  for_tokens(x, blocks, kTokenBlock,
             [&](int64_t begin, int64_t end) { layer_kernels().norm_rotary_backward(args, tokens, begin, end); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "layer_rotary(Tensor x, Tensor cos, Tensor sin, int pairs, bool one_angle_a_pair, bool upcast, "
      "bool is_backward, Tensor(a!) out) -> ()");
  m.def(
      "layer_norm_rotary(Tensor x, Tensor weight, float eps, int cast, Tensor cos, Tensor sin, int pairs, "
      "bool one_angle_a_pair, bool upcast, Tensor(a!) out, Tensor(b!) rstd) -> ()");
  m.def(
      "layer_norm_rotary_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, int cast, Tensor cos, "
      "Tensor sin, int pairs, bool one_angle_a_pair, bool upcast, Tensor(a!)? grad_x, Tensor(b!)? partials) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("layer_rotary", &layer_rotary);
  m.impl("layer_norm_rotary", &layer_norm_rotary);
  m.impl("layer_norm_rotary_backward", &layer_norm_rotary_backward);
}

}  // namespace trl_fast
