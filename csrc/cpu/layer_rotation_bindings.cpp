// Registers the rotary embeddings of layers as torch.ops.trl_fast.*; trl_fast/ops/layers calls them and specifies
// them.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/layer_arguments.h"

namespace trl_fast {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void read_heads_strides(const at::Tensor& x, const char* name, int64_t* strides) {
  TORCH_CHECK_VALUE(x.dim() == 4 && (x.size(3) == 1 || x.stride(3) == 1) && x.device().is_cpu(), name,
                    ": expected a CPU tensor of shape (B, heads, T, D) contiguous in D, got ", x.sizes());
  for (int i = 0; i < 3; ++i) strides[i] = x.stride(i);
}

Heads heads_of(const at::Tensor& x) {
  Heads heads = {};
  read_heads_strides(x, "x", heads.x_strides);
  heads.x = x.const_data_ptr();
  heads.dtype = dtype_of(x, "x");
  heads.heads = x.size(1);
  heads.tokens = x.size(2);
  heads.width = x.size(3);
  return heads;
}

void check_by_tokens(const at::Tensor& out, const char* name, const at::Tensor& x) {
  check_same(out, name, x);
  TORCH_CHECK_VALUE(out.transpose(1, 2).is_contiguous(), name, ": expected a view of a contiguous (B, T, heads, D)");
}

// Checks cos or sin of (B or 1, T, angles), and writes the strides of B and T.
void read_angles(const at::Tensor& angles, const char* name, const at::Tensor& x, int64_t* strides) {
  const bool fits = angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == x.size(0)) &&
                    angles.size(1) == x.size(2) && (angles.size(2) <= 1 || angles.stride(2) == 1);
  const bool is_dtype = angles.scalar_type() == x.scalar_type() || angles.scalar_type() == at::kFloat;
  TORCH_CHECK_VALUE(fits && is_dtype && angles.device().is_cpu(), name, ": expected ", x.scalar_type(),
                    " or float32 of shape (", x.size(0), " or 1, ", x.size(2), ", angles), got ", angles.scalar_type(),
                    " ", angles.sizes());
  strides[0] = angles.size(0) == 1 ? 0 : angles.stride(0);
  strides[1] = angles.stride(1);
}

Turns turns_of(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t pairs, bool one_angle_a_pair,
               bool upcast, bool is_backward) {
  Turns turns = {};
  read_angles(cos, "cos", x, turns.cos_strides);
  read_angles(sin, "sin", x, turns.sin_strides);
  TORCH_CHECK_VALUE(sin.sizes() == cos.sizes() && sin.scalar_type() == cos.scalar_type(),
                    "sin: expected what cos is, ", cos.scalar_type(), " ", cos.sizes());
  TORCH_CHECK_VALUE(pairs >= 0 && pairs <= 2, "pairs: expected 0, 1 or 2, got ", pairs);
  turns.cos = cos.const_data_ptr();
  turns.sin = sin.const_data_ptr();
  turns.dtype = dtype_of(cos, "cos");
  turns.pairs = static_cast<Pairs>(pairs);
  turns.one_angle_a_pair = one_angle_a_pair;
  turns.width = cos.size(2) * (one_angle_a_pair ? 2 : 1);
  TORCH_CHECK_VALUE(turns.width % 2 == 0 && turns.width <= x.size(3), "cos: expected angles of an even number of at ",
                    "most ", x.size(3), " numbers, got ", turns.width);
  turns.upcast = upcast;
  turns.is_backward = is_backward;
  return turns;
}

// Calls f for tokens of all rows, or for blocks of them.
template <typename F>
void for_tokens(const at::Tensor& x, int64_t count, int64_t tokens_a_count, F f) {
  const int64_t size = std::max<int64_t>(1, x.size(1) * x.size(3) * tokens_a_count);
  at::parallel_for(0, count, std::max<int64_t>(1, at::internal::GRAIN_SIZE / size), f);
}

void layer_rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t pairs,
                  bool one_angle_a_pair, bool upcast, bool is_backward, at::Tensor out) {
  RotaryArgs args = {};
  args.heads = heads_of(x);
  args.turns = turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, is_backward);
  check_by_tokens(out, "out", x);
  args.out = out.mutable_data_ptr();
  for_tokens(x, x.size(0) * x.size(2), 1,
             [&](int64_t begin, int64_t end) { layer_kernels().rotary(args, begin, end); });
}

// x: its heads may have a norm each, or all one, if the weight is as long as all of them.
NormRotaryArgs norm_rotary_args(const at::Tensor& x, const at::Tensor& weight, int64_t cast, const at::Tensor& rstd) {
  NormRotaryArgs args = {};
  args.heads = heads_of(x);
  const bool is_joint = weight.numel() != x.size(3);
  args.norm = norm_weight(weight, is_joint ? x.size(1) * x.size(3) : x.size(3), cast, x);
  TORCH_CHECK_VALUE(!is_joint || x.size(1) == 1 || x.stride(1) == x.size(3),
                    "x: expected heads side by side, for they have one norm, got strides ", x.strides());
  check_vector(rstd, "rstd", x.size(0) * x.size(2) * (is_joint ? 1 : x.size(1)), at::kFloat, at::kCPU);
  TORCH_CHECK_VALUE(rstd.is_contiguous(), "rstd: expected a contiguous tensor");
  args.rstd = static_cast<float*>(rstd.data_ptr());
  return args;
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
  NormRotaryArgs args = norm_rotary_args(x, weight, cast, rstd);
  args.turns = turns_of(x, cos, sin, pairs, one_angle_a_pair, upcast, true);
  check_same(grad, "grad", x);
  read_heads_strides(grad, "grad", args.grad_strides);
  args.grad = grad.const_data_ptr();
  if (grad_x) {
    check_by_tokens(*grad_x, "grad_x", x);
    args.out = grad_x->mutable_data_ptr();
  }
  const int64_t tokens = x.size(0) * x.size(2), blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  args.partials = partial_sums(partials, blocks, args.norm.columns);
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
