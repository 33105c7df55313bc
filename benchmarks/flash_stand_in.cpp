// Stands in for what attention calls on a GPU: the varlen flash kernels and the merge of their parts. They compute
// nothing, so that a CPU can tell what the calls cost a host.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double dropout, bool causal, bool debug,
    std::optional<double> scale, OptionalInt left, OptionalInt right, const OptionalTensor& used_keys,
    const OptionalTensor& slopes, const OptionalTensor& blocks, OptionalInt splits) {
  const Tensor state = at::empty({2}, query.options().dtype(at::kLong));
  const Tensor lse = at::empty({query.size(1), query.size(0)}, query.options().dtype(at::kFloat));
  return {at::empty_like(query), lse, state, at::empty({0}, state.options()), at::empty({0}, query.options())};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& out, const Tensor& lse,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_q,
                                            int64_t max_k, double dropout, bool causal, const Tensor& state,
                                            const Tensor& unused, std::optional<double> scale, OptionalInt left,
                                            OptionalInt right) {
  return {at::empty_like(query), at::empty_like(key), at::empty_like(value)};
}

std::tuple<Tensor, Tensor> merge(const Tensor& out, const Tensor& lse, const Tensor& other, const Tensor& other_lse,
                                 const Tensor& place) {
  return {at::empty(out.sizes(), out.options()), at::empty(lse.sizes(), lse.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_flash_attention_forward", TORCH_FN(forward));
  m.impl("_flash_attention_backward", TORCH_FN(backward));
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) { m.impl("merge_attention", TORCH_FN(merge)); }
