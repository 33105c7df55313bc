// Registers attention over a row of token trees as torch.ops.trl_fast.*; trl_fast/ops/attention.py calls it and
// specifies it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <atomic>
#include <stdexcept>

#include "cpu/attention_plan.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

// (heads, T, D) in memory, contiguous in D.
AttentionHeads heads_of(const at::Tensor& tensor, const char* name, int64_t heads, int64_t tokens, int64_t width,
                        at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == at::IntArrayRef({heads, tokens, width}) && tensor.scalar_type() == dtype &&
                        tensor.device().is_cpu() && (width <= 1 || tensor.numel() == 0 || tensor.stride(2) == 1),
                    name, ": expected ", dtype, " of shape (", heads, ", ", tokens, ", ", width,
                    ") on the CPU, contiguous in its last dimension, got ", tensor.scalar_type(), " ", tensor.sizes(),
                    " with strides ", tensor.strides());
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

AttentionRow row_of(at::IntArrayRef segments, at::IntArrayRef runs, bool whole_runs, int64_t tokens) {
  TORCH_CHECK_VALUE(segments.size() % 4 == 0, "segments: expected four numbers a segment, got ", segments.size());
  TORCH_CHECK_VALUE(runs.size() % 2 == 0, "runs: expected two numbers a run, got ", runs.size());
  try {
    return {segments.data(), static_cast<int64_t>(segments.size()) / 4,
            runs.data(),     static_cast<int64_t>(runs.size()) / 2,
            whole_runs,      tokens};
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

AttentionArgs attention_args(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t window,
                             double scale, double softcap, const at::Tensor& out, const at::Tensor& lse,
                             AttentionRow& row) {
  TORCH_CHECK_VALUE(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                    "query, key, value: expected (heads, T, D), got ", query.sizes(), ", ", key.sizes(), ", ",
                    value.sizes());
  const int64_t heads = query.size(0), groups = key.size(0), tokens = query.size(1), width = query.size(2);
  TORCH_CHECK_VALUE(groups > 0 && heads > 0 && heads % groups == 0, "query: expected heads, a multiple of ", groups,
                    ", got ", heads);
  TORCH_CHECK_VALUE(window >= 0, "window: expected tokens, or 0 for all, got ", window);
  AttentionArgs args = {};
  args.dtype = dtype_of(query, "query");
  args.tokens = tokens;
  args.groups = groups;
  args.group_size = heads / groups;
  args.width = width;
  args.value_width = value.size(2);
  args.scale = float_of(scale, "scale");
  args.softcap = float_of(softcap, "softcap");
  args.query = heads_of(query, "query", heads, tokens, width, query.scalar_type());
  args.key = heads_of(key, "key", groups, tokens, width, query.scalar_type());
  args.value = heads_of(value, "value", groups, tokens, args.value_width, query.scalar_type());
  args.out = heads_of(out, "out", heads, tokens, args.value_width, query.scalar_type());
  TORCH_CHECK_VALUE(lse.sizes() == at::IntArrayRef({heads, tokens}) && lse.scalar_type() == at::kFloat &&
                        lse.is_contiguous() && lse.device().is_cpu(),
                    "lse: expected contiguous float32 of shape (", heads, ", ", tokens, "), got ", lse.scalar_type(),
                    " ", lse.sizes());
  args.lse = static_cast<float*>(lse.data_ptr());
  plan_attention(args, row, window && window < tokens ? window : std::max<int64_t>(tokens, 1));
  return args;
}

// Runs tasks on all threads; each begins the next task in order.
template <typename F>
void run_in_order(int64_t num_tasks, int64_t scratch_size, F task) {
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(num_tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({scratch_size}, at::kFloat);
    for (int64_t n = next++; n < num_tasks; n = next++) task(n, scratch.mutable_data_ptr<float>());
  });
}

void row_attention_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           at::IntArrayRef segments, at::IntArrayRef runs, bool whole_runs, int64_t window,
                           double scale, double softcap, at::Tensor out, at::Tensor lse) {
  AttentionRow row = row_of(segments, runs, whole_runs, query.size(1));
  AttentionArgs args = attention_args(query, key, value, window, scale, softcap, out, lse, row);
  const AttentionKernels& kernels = attention_kernels();
  const at::Tensor keys = at::empty({kernels.packed_keys_size(args)}, at::kFloat);
  const at::Tensor values = at::empty({kernels.packed_values_size(args)}, at::kFloat);
  args.packed_keys = keys.mutable_data_ptr<float>();
  args.packed_values = values.mutable_data_ptr<float>();
  at::parallel_for(0, args.groups * args.num_blocks, 1,
                   [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
  run_in_order(args.groups * args.num_tiles, kernels.forward_scratch(args),
               [&](int64_t task, float* scratch) { kernels.forward(args, task, scratch); });
}

void row_attention_gradients(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
                             at::IntArrayRef segments, at::IntArrayRef runs, bool whole_runs, int64_t window,
                             double scale, double softcap, at::Tensor grad_query, at::Tensor grad_key,
                             at::Tensor grad_value) {
  AttentionRow row = row_of(segments, runs, whole_runs, query.size(1));
  AttentionArgs args = attention_args(query, key, value, window, scale, softcap, out, lse, row);
  const int64_t heads = query.size(0), tokens = args.tokens;
  const at::ScalarType dtype = query.scalar_type();
  args.grad = heads_of(grad, "grad", heads, tokens, args.value_width, dtype);
  args.grad_key = heads_of(grad_key, "grad_key", args.groups, tokens, args.width, dtype);
  args.grad_value = heads_of(grad_value, "grad_value", args.groups, tokens, args.value_width, dtype);
  heads_of(grad_query, "grad_query", heads, tokens, args.width, dtype);
  const at::Tensor sums = dtype == at::kFloat ? grad_query.zero_() : at::zeros_like(grad_query, at::kFloat);
  args.grad_query = {sums.data_ptr(), sums.stride(0), sums.stride(1)};
  const at::Tensor deltas = at::empty({heads, tokens}, at::kFloat);
  args.deltas = deltas.mutable_data_ptr<float>();
  const AttentionKernels& kernels = attention_kernels();
  at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) { kernels.prepare_backward(args, begin, end); });
  run_in_order(args.groups * args.num_spans, kernels.backward_scratch(args),
               [&](int64_t task, float* scratch) { kernels.backward(args, task, scratch); });
  if (dtype != at::kFloat) grad_query.copy_(sums);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "row_attention_forward(Tensor query, Tensor key, Tensor value, int[] segments, int[] runs, bool whole_runs, "
      "int window, float scale, float softcap, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "row_attention_gradients(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "int[] segments, int[] runs, bool whole_runs, int window, float scale, float softcap, Tensor(a!) grad_query, "
      "Tensor(b!) grad_key, Tensor(c!) grad_value) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("row_attention_forward", &row_attention_forward);
  m.impl("row_attention_gradients", &row_attention_gradients);
}

}  // namespace trl_fast
