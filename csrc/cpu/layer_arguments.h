// Checks the tensors that the kernels of layers get, and describes them to the kernels.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cpu/layer_kernels.h"
#include "row_arguments.h"

namespace trl_fast {

// Checks a tensor's shape, dtype and device against another's.
inline void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& as) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == as.sizes() && tensor.scalar_type() == as.scalar_type() && tensor.device().is_cpu(), name,
      ": expected ", as.scalar_type(), " of shape ", as.sizes(), " on the CPU, got ", tensor.scalar_type(), " ",
      tensor.sizes());
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
inline NormWeight norm_weight(const std::optional<at::Tensor>& weight, int64_t columns, int64_t cast,
                              const at::Tensor& x) {
  TORCH_CHECK_VALUE(cast >= 0 && cast <= 2, "cast: expected 0, 1 or 2, got ", cast);
  if (weight) {
    check_vector(*weight, "weight", columns, x.scalar_type(), at::kCPU);
    TORCH_CHECK_VALUE(weight->is_contiguous(), "weight: expected a contiguous tensor");
  }
  return {weight ? weight->const_data_ptr() : nullptr, dtype_of(x, "x"), static_cast<NormCast>(cast), columns};
}

// Checks sums of a weight's gradient, (blocks, columns) in float32; returns null where none are wanted.
inline float* partial_sums(const std::optional<at::Tensor>& partials, int64_t blocks, int64_t columns) {
  if (!partials) return nullptr;
  TORCH_CHECK_VALUE(partials->sizes() == at::IntArrayRef({blocks, columns}) && partials->is_contiguous() &&
                        partials->scalar_type() == at::kFloat && partials->device().is_cpu(),
                    "partials: expected float32 of shape (", blocks, ", ", columns, "), got ", partials->sizes());
  return partials->mutable_data_ptr<float>();
}

}  // namespace trl_fast
