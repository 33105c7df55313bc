// Registers the norms, gates and rotations of layers with their backward passes as torch.ops.trl_fast.eager_*.
//
// trl_fast/ops/layers specifies them and has them in Python too, for what no kernel serves and for compilers. These do
// the same without Python in between: on a GPU a small model waits for its host. The kernels are those of the tensors'
// device.
#include "autograd_support.h"
#include "cpu/layer_kernels.h"
#include "layer_arguments.h"

namespace trl_fast {
namespace {

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// Sums of the gradient by a weight of `width` numbers; blocks: those of a CPU's kernel.
at::Tensor room_for_sums(const at::Tensor& x, int64_t width, int64_t rows, int64_t blocks) {
  const int64_t workers = std::min(rows, std::max(kFewestWorkers, kNumbersOfWorkers / width));
  return at::empty({x.device().is_cpu() ? blocks : workers, width}, x.options().dtype(at::kFloat));
}

// ---- norms

struct Normed {
  at::Tensor y, sum, rstd;
};

Normed normalise(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, double eps,
                 int64_t cast) {
  static const auto run = kernel<void(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, double, int64_t,
                                      at::Tensor, OptionalTensor, at::Tensor)>("trl_fast::layer_rms_norm");
  const Normed to = {room_for(x), residual ? room_for(x) : at::Tensor(),
                     at::empty({x.numel() / x.size(-1)}, x.options().dtype(at::kFloat))};
  run.call(x, residual, contiguous(weight), eps, cast, to.y, optional(to.sum), to.rstd);
  return to;
}

// Gradients by what was normalised and by the weight, undefined where they are not needed.
Both norm_gradients(const at::Tensor& grad, const OptionalTensor& grad_sum, const at::Tensor& x,
                    const OptionalTensor& weight, const at::Tensor& rstd, int64_t cast, bool needs_x,
                    bool needs_weight) {
  static const auto run =
      kernel<void(const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
                  const at::Tensor&, int64_t, OptionalTensor, OptionalTensor)>("trl_fast::layer_rms_norm_backward");
  at::Tensor by_x, sums;
  if (needs_x) by_x = room_for(x);
  if (needs_weight) sums = room_for_sums(x, x.size(-1), rstd.numel(), (rstd.numel() + kNormBlock - 1) / kNormBlock);
  run.call(grad, grad_sum, x, contiguous(weight), rstd, cast, optional(by_x), optional(sums));
  return {by_x, needs_weight ? sums.sum(0).to(x.scalar_type()) : sums};
}

// What a norm gives beside its result.
enum class Beside { kNothing, kSum, kInput };

template <Beside kBeside>
class Norm : public Function<Norm<kBeside>> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& weight, double eps, int64_t cast) {
    const Normed made = normalise(x, residual, weight, eps, cast);
    ctx->saved_data["cast"] = cast;
    // No zeros are filled for what has no gradient.
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({kBeside == Beside::kSum ? made.sum : x, weight.value_or(at::Tensor()), made.rstd});
    if constexpr (kBeside == Beside::kNothing) return {made.y};
    return {made.y, kBeside == Beside::kSum ? made.sum : x.view(x.sizes())};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative(kBeside == Beside::kNothing ? "rms_norm"
                           : kBeside == Beside::kSum   ? "residual_rms_norm"
                                                       : "norm_and_residual");
    constexpr bool kAdds = kBeside == Beside::kSum;
    const variable_list saved = ctx->get_saved_variables();
    const bool has_weight = saved[1].defined();
    const bool needs_x = ctx->needs_input_grad(0), needs_residual = kAdds && ctx->needs_input_grad(1);
    const bool needs_weight = has_weight && ctx->needs_input_grad(kAdds ? 2 : 1);
    at::Tensor by_x = grads.size() > 1 ? grads[1] : at::Tensor(), by_weight;
    if (grads[0].defined()) {
      std::tie(by_x, by_weight) =
          norm_gradients(grads[0], optional(by_x), saved[0], optional(saved[1]), saved[2],
                         ctx->saved_data["cast"].toInt(), needs_x || needs_residual, needs_weight);
    }
    return {needs_x ? by_x : at::Tensor(), needs_residual ? by_x : at::Tensor(), by_weight, {}, {}};
  }
};

at::Tensor rms_norm(const at::Tensor& x, const OptionalTensor& weight, double eps, int64_t cast) {
  return Norm<Beside::kNothing>::apply(x, std::nullopt, weight, eps, cast)[0];
}

Both residual_rms_norm(const at::Tensor& x, const at::Tensor& residual, const OptionalTensor& weight, double eps,
                       int64_t cast) {
  const variable_list made = Norm<Beside::kSum>::apply(x, residual, weight, eps, cast);
  return {made[0], made[1]};
}

Both norm_and_residual(const at::Tensor& x, const OptionalTensor& weight, double eps, int64_t cast) {
  const variable_list made = Norm<Beside::kInput>::apply(x, std::nullopt, weight, eps, cast);
  return {made[0], made[1]};
}

// ---- gates

// Gate and up (..., I) as (R, I) of one stride: views where that can be, else copies.
Both as_matrices(const at::Tensor& gate, const at::Tensor& up) {
  const int64_t width = gate.dim() && gate.numel() ? gate.size(-1) : 1;
  const at::Tensor g = gate.reshape({-1, width}), u = up.reshape({-1, width});
  const bool alike = g.stride(0) == u.stride(0) && (width == 1 || (g.stride(1) == 1 && u.stride(1) == 1));
  if (alike) return {g, u};
  return {g.contiguous(), u.contiguous()};
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up, int64_t activation) {
  static const auto run =
      kernel<void(const at::Tensor&, const at::Tensor&, int64_t, at::Tensor)>("trl_fast::layer_gated_activation");
  at::Tensor out = room_for(gate);
  const auto [g, u] = as_matrices(gate, up);
  run.call(g, u, activation, out.view(g.sizes()));
  return out;
}

// Writes the gradients of gate and up, which may be halves of rows.
void differentiate_gated(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                         const at::Tensor& grad_gate, const at::Tensor& grad_up) {
  static const auto run =
      kernel<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, at::Tensor, at::Tensor)>(
          "trl_fast::layer_gated_activation_backward");
  const auto [g, u] = as_matrices(gate, up);
  run.call(grad.reshape(g.sizes()).contiguous(), g, u, activation, grad_gate.view(g.sizes()), grad_up.view(g.sizes()));
}

class GatedActivation : public Function<GatedActivation> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up, int64_t activation) {
    ctx->saved_data["activation"] = activation;
    ctx->save_for_backward({gate, up});
    return gated(gate, up, activation);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("gated_activation");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor by_gate = room_for(saved[0]), by_up = room_for(saved[0]);
    differentiate_gated(grads[0], saved[0], saved[1], ctx->saved_data["activation"].toInt(), by_gate, by_up);
    return {by_gate, by_up, {}};
  }
};

class ChunkedGatedActivation : public Function<ChunkedGatedActivation> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up, int64_t activation) {
    ctx->saved_data["activation"] = activation;
    ctx->save_for_backward({gate_up});
    const std::vector<at::Tensor> halves = gate_up.chunk(2, -1);
    return gated(halves[0], halves[1], activation);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("chunked_gated_activation");
    const at::Tensor gate_up = ctx->get_saved_variables()[0], out = room_for(gate_up);
    const std::vector<at::Tensor> halves = gate_up.chunk(2, -1), by_halves = out.chunk(2, -1);
    differentiate_gated(grads[0], halves[0], halves[1], ctx->saved_data["activation"].toInt(), by_halves[0],
                        by_halves[1]);
    return {out, {}};
  }
};

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, int64_t activation) {
  return GatedActivation::apply(gate, up, activation);
}

at::Tensor chunked_gated_activation(const at::Tensor& gate_up, int64_t activation) {
  return ChunkedGatedActivation::apply(gate_up, activation);
}

// ---- rotations

// How heads are turned; `cos` and `sin` are not of it.
struct Way {
  int64_t pairs;
  bool one_angle_a_pair, upcast;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["pairs"] = pairs;
    ctx->saved_data["one_angle_a_pair"] = one_angle_a_pair;
    ctx->saved_data["upcast"] = upcast;
  }

  static Way of(AutogradContext* ctx) {
    return {ctx->saved_data["pairs"].toInt(), ctx->saved_data["one_angle_a_pair"].toBool(),
            ctx->saved_data["upcast"].toBool()};
  }
};

// A copy where the last dimension does not lie in one piece.
at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

// Room for (B, heads, T, D), a view of a contiguous (B, T, heads, D).
at::Tensor room_by_tokens(const at::Tensor& x) {
  return room_for({x.size(0), x.size(2), x.size(1), x.size(3)}, x).transpose(1, 2);
}

at::Tensor turn(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, Way way, bool is_backward) {
  static const auto run =
      kernel<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool, bool, bool, at::Tensor)>(
          "trl_fast::layer_rotary");
  const at::Tensor out = room_by_tokens(x);
  run.call(with_contiguous_rows(x), with_contiguous_rows(cos), with_contiguous_rows(sin), way.pairs,
           way.one_angle_a_pair, way.upcast, is_backward, out);
  return out;
}

class Rotary : public Function<Rotary> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const OptionalTensor& key,
                               const at::Tensor& cos, const at::Tensor& sin, Way way) {
    way.save(ctx);
    ctx->saved_data["has_key"] = key.has_value();
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({cos, sin});
    variable_list turned = {turn(query, cos, sin, way, false)};
    if (key) turned.push_back(turn(*key, cos, sin, way, false));
    return turned;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("rotary");
    const variable_list saved = ctx->get_saved_variables();
    const Way way = Way::of(ctx);
    variable_list by_heads(5);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].defined()) by_heads[i] = turn(grads[i], saved[0], saved[1], way, true);
    }
    return by_heads;
  }
};

Both rotary(const at::Tensor& query, const OptionalTensor& key, const at::Tensor& cos, const at::Tensor& sin,
            int64_t pairs, bool one_angle_a_pair, bool upcast) {
  const variable_list turned = Rotary::apply(query, key, cos, sin, Way{pairs, one_angle_a_pair, upcast});
  return {turned[0], turned.size() > 1 ? turned[1] : at::Tensor()};
}

// ---- norms with their rotation

// Whether one kernel normalises and turns: a GPU's has no norm of all heads of a token.
bool has_norm_rotary(const at::Tensor& x, const at::Tensor& weight) {
  return x.device().is_cpu() || weight.numel() == x.size(3);
}

// Heads so that what has one norm lies in one piece: a copy where it does not.
at::Tensor side_by_side(const at::Tensor& x, const at::Tensor& weight) {
  const bool is_alone = weight.numel() == x.size(3) || x.size(1) == 1;
  if (x.stride(3) == 1 && (is_alone || x.stride(1) == x.size(3))) return x;
  return x.transpose(1, 2).clone(at::MemoryFormat::Contiguous).transpose(1, 2);
}

// (B, heads, T, D) as rows of the norm's length.
at::Tensor by_norms(const at::Tensor& x, int64_t width) { return x.transpose(1, 2).reshape({-1, width}); }

at::Tensor by_heads(const at::Tensor& rows, const at::Tensor& x) {
  return rows.view({x.size(0), x.size(2), x.size(1), x.size(3)}).transpose(1, 2);
}

// Heads, normalised and turned, and a number a norm.
Both turned_norm(const at::Tensor& x, const at::Tensor& weight, double eps, int64_t cast, const at::Tensor& cos,
                 const at::Tensor& sin, Way way) {
  static const auto run =
      kernel<void(const at::Tensor&, const at::Tensor&, double, int64_t, const at::Tensor&, const at::Tensor&, int64_t,
                  bool, bool, at::Tensor, at::Tensor)>("trl_fast::layer_norm_rotary");
  const at::Tensor heads = side_by_side(x, weight);
  if (!has_norm_rotary(x, weight)) {
    const Normed made = normalise(by_norms(heads, weight.numel()), std::nullopt, weight, eps, cast);
    return {turn(by_heads(made.y, x), cos, sin, way, false), made.rstd};
  }
  const at::Tensor out = room_by_tokens(x);
  const at::Tensor rstd = at::empty({x.numel() / weight.numel()}, x.options().dtype(at::kFloat));
  run.call(heads, weight.contiguous(), eps, cast, with_contiguous_rows(cos), with_contiguous_rows(sin), way.pairs,
           way.one_angle_a_pair, way.upcast, out, rstd);
  return {out, rstd};
}

Both turned_norm_gradients(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           const at::Tensor& rstd, int64_t cast, const at::Tensor& cos, const at::Tensor& sin, Way way,
                           bool needs_weight) {
  static const auto run =
      kernel<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                  const at::Tensor&, const at::Tensor&, int64_t, bool, bool, OptionalTensor, OptionalTensor)>(
          "trl_fast::layer_norm_rotary_backward");
  const at::Tensor heads = side_by_side(x, weight);
  if (!has_norm_rotary(x, weight)) {
    const at::Tensor turned = by_norms(turn(grad, cos, sin, way, true), weight.numel());
    const auto [by_rows, by_weight] =
        norm_gradients(turned, std::nullopt, by_norms(heads, weight.numel()), weight, rstd, cast, true, needs_weight);
    return {by_heads(by_rows, x), by_weight};
  }
  const at::Tensor out = room_by_tokens(x);
  at::Tensor sums;
  if (needs_weight) {
    const int64_t blocks = (x.size(0) * x.size(2) + kTokenBlock - 1) / kTokenBlock;
    sums = room_for_sums(x, weight.numel(), rstd.numel(), blocks);
  }
  run.call(with_contiguous_rows(grad), heads, weight.contiguous(), rstd, cast, with_contiguous_rows(cos),
           with_contiguous_rows(sin), way.pairs, way.one_angle_a_pair, way.upcast, out, optional(sums));
  return {out, needs_weight ? sums.sum(0).to(x.scalar_type()) : sums};
}

class QkNormRotary : public Function<QkNormRotary> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& query_weight, const at::Tensor& key_weight, const at::Tensor& cos,
                               const at::Tensor& sin, double eps, int64_t cast, Way way) {
    const auto [turned_query, query_rstd] = turned_norm(query, query_weight, eps, cast, cos, sin, way);
    const auto [turned_key, key_rstd] = turned_norm(key, key_weight, eps, cast, cos, sin, way);
    way.save(ctx);
    ctx->saved_data["cast"] = cast;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({query, query_weight, query_rstd, key, key_weight, key_rstd, cos, sin});
    return {turned_query, turned_key};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("qk_norm_rotary");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &cos = saved[6], &sin = saved[7];
    variable_list by_inputs(9);
    for (size_t i = 0; i < 2; ++i) {
      if (!grads[i].defined()) continue;
      const at::Tensor* const of = &saved[3 * i];
      std::tie(by_inputs[i], by_inputs[2 + i]) =
          turned_norm_gradients(grads[i], of[0], of[1], of[2], ctx->saved_data["cast"].toInt(), cos, sin, Way::of(ctx),
                                ctx->needs_input_grad(2 + i));
    }
    return by_inputs;
  }
};

Both qk_norm_rotary(const at::Tensor& query, const at::Tensor& key, const at::Tensor& query_weight,
                    const at::Tensor& key_weight, const at::Tensor& cos, const at::Tensor& sin, double eps,
                    int64_t cast, int64_t pairs, bool one_angle_a_pair, bool upcast) {
  const Way way = {pairs, one_angle_a_pair, upcast};
  const variable_list made = QkNormRotary::apply(query, key, query_weight, key_weight, cos, sin, eps, cast, way);
  return {made[0], made[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def("eager_rms_norm(Tensor x, Tensor? weight, float eps, int cast) -> Tensor", &rms_norm);
  m.def("eager_residual_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, int cast) -> (Tensor, Tensor)",
        &residual_rms_norm);
  m.def("eager_norm_and_residual(Tensor(a) x, Tensor? weight, float eps, int cast) -> (Tensor, Tensor(a))",
        &norm_and_residual);
  m.def("eager_gated_activation(Tensor gate, Tensor up, int activation) -> Tensor", &gated_activation);
  m.def("eager_chunked_gated_activation(Tensor gate_up, int activation) -> Tensor", &chunked_gated_activation);
  m.def(
      "eager_rotary(Tensor query, Tensor? key, Tensor cos, Tensor sin, int pairs, bool one_angle_a_pair, bool upcast) "
      "-> (Tensor, Tensor)",
      &rotary);
  m.def(
      "eager_qk_norm_rotary(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, "
      "float eps, int cast, int pairs, bool one_angle_a_pair, bool upcast) -> (Tensor, Tensor)",
      &qk_norm_rotary);
}

}  // namespace trl_fast
