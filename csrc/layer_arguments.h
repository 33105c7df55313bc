// Checks the tensors that the kernels of layers get, and describes them to the kernels.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "layer_types.h"
#include "row_arguments.h"

namespace trl_fast {

using OptionalTensor = std::optional<at::Tensor>;

// Checks a tensor's shape, dtype and device against another's.
inline void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& as) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == as.sizes() && tensor.scalar_type() == as.scalar_type() && tensor.device() == as.device(), name,
      ": expected ", as.scalar_type(), " of shape ", as.sizes(), " on ", as.device(), ", got ", tensor.scalar_type(),
      " ", tensor.sizes(), " on ", tensor.device());
}

inline void check_dense(const at::Tensor& tensor, const char* name, const at::Tensor& as) {
  check_same(tensor, name, as);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

// A tensor (..., H) as rows: where its outer dimensions are more than three that cannot be joined, or its rows are not
// contiguous, a copy of it.
class RowsOf {
 public:
  explicit RowsOf(const at::Tensor& tensor)
      : tensor_(tensor.size(-1) > 1 && tensor.stride(-1) != 1 ? tensor.contiguous() : tensor) {
    if (!join()) {
      tensor_ = tensor_.contiguous();
      join();
    }
  }

  Rows rows() const {
    Rows rows = {tensor_.const_data_ptr(), {1, 1}, {0, 0, 0}};
    const size_t n = sizes_.size();
    for (size_t i = 0; i < n; ++i) rows.strides[3 - n + i] = strides_[i];
    for (size_t i = 0; i < 2 && i < n; ++i) rows.sizes[1 - i] = sizes_[n - 1 - i];
    return rows;
  }

 private:
  // Joins dimensions that lie in one another; returns whether three are enough.
  bool join() {
    sizes_.clear();
    strides_.clear();
    for (int64_t i = 0; i + 1 < tensor_.dim(); ++i) {
      const int64_t size = tensor_.size(i), stride = tensor_.stride(i);
      if (size == 1) continue;
      if (!sizes_.empty() && strides_.back() == size * stride) {
        sizes_.back() *= size;
        strides_.back() = stride;
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
    return sizes_.size() <= 3;
  }

  at::Tensor tensor_;
  std::vector<int64_t> sizes_, strides_;
};

// The weight of a norm of `columns`, which the kernels read as long as the tensor lives.
inline NormWeight norm_weight(const OptionalTensor& weight, int64_t columns, int64_t cast, const at::Tensor& x) {
  TORCH_CHECK_VALUE(cast >= 0 && cast <= 2, "cast: expected 0, 1 or 2, got ", cast);
  if (weight) {
    check_vector(*weight, "weight", columns, x.scalar_type(), x.device());
    TORCH_CHECK_VALUE(weight->is_contiguous(), "weight: expected a contiguous tensor");
  }
  return {weight ? weight->const_data_ptr() : nullptr, dtype_of(x, "x"), static_cast<NormCast>(cast), columns};
}

// Checks sums of a weight's gradient, (blocks, columns) in float32; returns null where none are wanted.
inline float* partial_sums(const OptionalTensor& partials, int64_t blocks, int64_t columns, at::Device device) {
  if (!partials) return nullptr;
  TORCH_CHECK_VALUE(partials->sizes() == at::IntArrayRef({blocks, columns}) && partials->is_contiguous() &&
                        partials->scalar_type() == at::kFloat && partials->device() == device,
                    "partials: expected float32 of shape (", blocks, ", ", columns, "), got ", partials->sizes());
  return partials->mutable_data_ptr<float>();
}

inline NormArgs norm_args(const at::Tensor& x, const RowsOf& x_rows, const OptionalTensor& weight, int64_t cast,
                          const at::Tensor& rstd) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x: expected rows, got shape ", x.sizes());
  const int64_t columns = x.size(-1);
  NormArgs args = {};
  args.weight = norm_weight(weight, columns, cast, x);
  args.rows = columns ? x.numel() / columns : 0;
  args.x = x_rows.rows();
  check_vector(rstd, "rstd", args.rows, at::kFloat, x.device());
  TORCH_CHECK_VALUE(rstd.is_contiguous(), "rstd: expected a contiguous tensor");
  args.rstd = static_cast<float*>(rstd.data_ptr());
  return args;
}

// Takes the rows of its arguments, which may be copies that have to live on.
inline NormArgs norm_forward_args(const at::Tensor& x, const RowsOf& x_rows, const OptionalTensor& residual,
                                  const RowsOf& residual_rows, const OptionalTensor& weight, double eps, int64_t cast,
                                  const at::Tensor& out, const OptionalTensor& sum, const at::Tensor& rstd) {
  NormArgs args = norm_args(x, x_rows, weight, cast, rstd);
  args.eps = static_cast<float>(eps);
  check_dense(out, "out", x);
  args.out = out.mutable_data_ptr();
  TORCH_CHECK_VALUE(residual.has_value() == sum.has_value(), "sum: expected where there is a residual, only there");
  if (residual) {
    check_same(*residual, "residual", x);
    check_dense(*sum, "sum", x);
    args.residual = residual_rows.rows();
    args.sum = sum->mutable_data_ptr();
  }
  return args;
}

// The same; the partial sums are left out.
inline NormArgs norm_backward_args(const at::Tensor& grad, const RowsOf& grad_rows, const OptionalTensor& grad_sum,
                                   const RowsOf& sum_rows, const at::Tensor& x, const RowsOf& x_rows,
                                   const OptionalTensor& weight, const at::Tensor& rstd, int64_t cast,
                                   const OptionalTensor& grad_x) {
  NormArgs args = norm_args(x, x_rows, weight, cast, rstd);
  check_same(grad, "grad", x);
  args.grad = grad_rows.rows();
  if (grad_sum) {
    check_same(*grad_sum, "grad_sum", x);
    args.grad_sum = sum_rows.rows();
  }
  if (grad_x) {
    check_dense(*grad_x, "grad_x", x);
    args.out = grad_x->mutable_data_ptr();
  }
  return args;
}

// Checks a matrix of contiguous rows; returns the elements from one row to the next.
inline int64_t check_matrix(const at::Tensor& tensor, const char* name, const at::Tensor& as) {
  check_same(tensor, name, as);
  check_rows(tensor, name, as.device());
  return tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1);
}

inline GateArgs gate_args(const at::Tensor& gate, const at::Tensor& up, int64_t activation) {
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 2, "activation: expected 0, 1 or 2, got ", activation);
  GateArgs args = {};
  args.stride = check_matrix(gate, "gate", gate);
  TORCH_CHECK_VALUE(check_matrix(up, "up", gate) == args.stride, "up: expected the strides of gate, ", gate.strides(),
                    ", got ", up.strides());
  args.gate = gate.const_data_ptr();
  args.up = up.const_data_ptr();
  args.columns = gate.size(1);
  args.dtype = dtype_of(gate, "gate");
  args.activation = static_cast<Activation>(activation);
  return args;
}

inline GateArgs gate_backward_args(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                                   int64_t activation, const at::Tensor& grad_gate, const at::Tensor& grad_up) {
  GateArgs args = gate_args(gate, up, activation);
  check_dense(grad, "grad", gate);
  args.grad_stride = check_matrix(grad_gate, "grad_gate", gate);
  TORCH_CHECK_VALUE(check_matrix(grad_up, "grad_up", gate) == args.grad_stride,
                    "grad_up: expected the strides of grad_gate, ", grad_gate.strides(), ", got ", grad_up.strides());
  args.grad = grad.const_data_ptr();
  args.grad_gate = grad_gate.mutable_data_ptr();
  args.grad_up = grad_up.mutable_data_ptr();
  return args;
}

inline void read_heads_strides(const at::Tensor& x, const char* name, int64_t* strides) {
  TORCH_CHECK_VALUE(x.dim() == 4 && (x.size(3) == 1 || x.stride(3) == 1), name,
                    ": expected a tensor of shape (B, heads, T, D) contiguous in D, got ", x.sizes());
  for (int i = 0; i < 3; ++i) strides[i] = x.stride(i);
}

inline Heads heads_of(const at::Tensor& x) {
  Heads heads = {};
  read_heads_strides(x, "x", heads.x_strides);
  heads.x = x.const_data_ptr();
  heads.dtype = dtype_of(x, "x");
  heads.heads = x.size(1);
  heads.tokens = x.size(2);
  heads.width = x.size(3);
  return heads;
}

inline void check_by_tokens(const at::Tensor& out, const char* name, const at::Tensor& x) {
  check_same(out, name, x);
  TORCH_CHECK_VALUE(out.transpose(1, 2).is_contiguous(), name, ": expected a view of a contiguous (B, T, heads, D)");
}

// Checks cos or sin of (B or 1, T, angles), and writes the strides of B and T.
inline void read_angles(const at::Tensor& angles, const char* name, const at::Tensor& x, int64_t* strides) {
  const bool fits = angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == x.size(0)) &&
                    angles.size(1) == x.size(2) && (angles.size(2) <= 1 || angles.stride(2) == 1);
  const bool is_dtype = angles.scalar_type() == x.scalar_type() || angles.scalar_type() == at::kFloat;
  TORCH_CHECK_VALUE(fits && is_dtype && angles.device() == x.device(), name, ": expected ", x.scalar_type(),
                    " or float32 of shape (", x.size(0), " or 1, ", x.size(2), ", angles), got ", angles.scalar_type(),
                    " ", angles.sizes());
  strides[0] = angles.size(0) == 1 ? 0 : angles.stride(0);
  strides[1] = angles.stride(1);
}

inline Turns turns_of(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t pairs,
                      bool one_angle_a_pair, bool upcast, bool is_backward) {
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

inline RotaryArgs rotary_args(const at::Tensor& x, const Turns& turns, const at::Tensor& out) {
  check_by_tokens(out, "out", x);
  return {heads_of(x), turns, out.mutable_data_ptr()};
}

// x: its heads may have a norm each, or all one, if the weight is as long as all of them.
inline NormRotaryArgs norm_rotary_args(const at::Tensor& x, const at::Tensor& weight, int64_t cast,
                                       const at::Tensor& rstd) {
  NormRotaryArgs args = {};
  args.heads = heads_of(x);
  const bool is_joint = weight.numel() != x.size(3);
  args.norm = norm_weight(weight, is_joint ? x.size(1) * x.size(3) : x.size(3), cast, x);
  TORCH_CHECK_VALUE(!is_joint || x.size(1) == 1 || x.stride(1) == x.size(3),
                    "x: expected heads side by side, for they have one norm, got strides ", x.strides());
  check_vector(rstd, "rstd", x.size(0) * x.size(2) * (is_joint ? 1 : x.size(1)), at::kFloat, x.device());
  TORCH_CHECK_VALUE(rstd.is_contiguous(), "rstd: expected a contiguous tensor");
  args.rstd = static_cast<float*>(rstd.data_ptr());
  return args;
}

// Turns and partial sums are left out.
inline NormRotaryArgs norm_rotary_backward_args(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& rstd, int64_t cast, const OptionalTensor& grad_x) {
  NormRotaryArgs args = norm_rotary_args(x, weight, cast, rstd);
  check_same(grad, "grad", x);
  read_heads_strides(grad, "grad", args.grad_strides);
  args.grad = grad.const_data_ptr();
  if (grad_x) {
    check_by_tokens(*grad_x, "grad_x", x);
    args.out = grad_x->mutable_data_ptr();
  }
  return args;
}

}  // namespace trl_fast
