// Registers the CUDA kernel that merges attention as torch.ops.trl_fast.merge_attention; csrc/bindings.cpp has its
// schema, and trl_fast/ops/attention_merge.py specifies it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/attention_merge.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

void check_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype,
                  at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == dtype && tensor.device() == device, name,
                    ": expected ", dtype, " of shape ", sizes, " on ", device, ", got ", tensor.scalar_type(), " ",
                    tensor.sizes(), " on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name,
                    ": expected a contiguous last dimension, got strides ", tensor.strides());
}

AttentionOutput attention_output(const at::Tensor& out, const at::Tensor& lse) {
  return {out.const_data_ptr(), out.stride(0), out.stride(1), lse.const_data_ptr<float>(), lse.stride(0)};
}

std::tuple<at::Tensor, at::Tensor> merge_attention(const at::Tensor& out, const at::Tensor& lse,
                                                   const at::Tensor& other, const at::Tensor& other_lse,
                                                   const at::Tensor& place) {
  const auto check_rank = [](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_VALUE(tensor.dim() == 3, name, ": expected shape (T, heads, D), got ", tensor.sizes());
  };
  check_rank(out, "out");
  check_rank(other, "other");
  const Dtype dtype = dtype_of(out, "out");
  const int64_t tokens = out.size(0), heads = out.size(1), width = out.size(2), others = other.size(0);
  check_tensor(out, "out", out.sizes(), out.scalar_type(), out.device());
  check_tensor(lse, "lse", {heads, tokens}, at::kFloat, out.device());
  check_tensor(other, "other", {others, heads, width}, out.scalar_type(), out.device());
  check_tensor(other_lse, "other_lse", {heads, others}, at::kFloat, out.device());
  check_tensor(place, "place", {tokens}, at::kInt, out.device());
  const c10::cuda::CUDAGuard guard(out.device());
  at::Tensor merged = at::empty(out.sizes(), out.options()), merged_lse = at::empty(lse.sizes(), lse.options());
  const AttentionMergeArgs args = {attention_output(out, lse),
                                   attention_output(other, other_lse),
                                   place.const_data_ptr<int32_t>(),
                                   dtype,
                                   tokens,
                                   heads,
                                   width,
                                   merged.mutable_data_ptr(),
                                   merged_lse.mutable_data_ptr<float>()};
  cuda::launch_attention_merge(args, c10::cuda::getCurrentCUDAStream());
  return {merged, merged_lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) { m.impl("merge_attention", &merge_attention); }

}  // namespace trl_fast
