// What ops have in common whose backward passes are in C++ (torch.ops.trl_fast.eager_*).
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/memory_pool.h"

namespace trl_fast {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Both = std::tuple<at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

// Finds an op of some library by its full name, whatever device it is for.
template <typename Signature>
c10::TypedOperatorHandle<Signature> kernel(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A tensor that is not there, as autograd saves and gives it, is one that is not defined.
inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Raises in a backward pass that is recorded: autograd does so only to differentiate it.
inline void check_first_derivative(std::string_view op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op,
              " has no second derivative: create_graph=True and torch.func cannot be used through it; compute that "
              "part with plain PyTorch");
}

// Uninitialised memory, of the pool where trl_fast/ops/memory_pool.py takes it from there.
inline at::Tensor room_for(at::IntArrayRef size, const at::Tensor& like) {
  const int64_t bytes = c10::multiply_integers(size) * like.element_size();
  if (!like.device().is_cpu() || bytes < kPooledFromBytes) return at::empty(size, like.options());
  static const auto pooled = kernel<at::Tensor(at::IntArrayRef, at::ScalarType)>("trl_fast::pooled_empty");
  return pooled.call(size, like.scalar_type());
}

inline at::Tensor room_for(const at::Tensor& like) { return room_for(like.sizes(), like); }

}  // namespace trl_fast
