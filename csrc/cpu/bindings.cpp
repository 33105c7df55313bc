// Registers the CPU kernels and the memory pool as torch.ops.trl_fast.*; csrc/bindings.cpp has the schemas of the ops
// that CUDA kernels serve too.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <torch/library.h>

#include "cpu/divergence_kernels.h"
#include "cpu/memory_pool.h"
#include "cpu/row_kernels.h"
#include "cpu/sparse_kernels.h"
#include "divergence_arguments.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

// Returns how many rows of so many columns are worth a thread of their own.
int64_t rows_per_task(int64_t columns) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, columns));
}

void row_scores(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                double scale, double softcap, double inv_temperature, int64_t outputs, int64_t column_offset,
                at::Tensor state) {
  const RowInputs in = row_inputs(at::kCPU, logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  const ScoreArgs args = score_args(in, logits, outputs, state);
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, logits.size(0), rows_per_task(logits.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.scores(args, begin, end); });
}

void row_weights(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                 double scale, double softcap, double inv_temperature, int64_t outputs, int64_t column_offset,
                 at::Tensor state, at::Tensor out) {
  const RowInputs in = row_inputs(at::kCPU, logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  check_out(out, logits);
  ScoreArgs args = score_args(in, logits, outputs, state);
  args.weights = out.mutable_data_ptr();
  args.weights_stride = out.stride(0);
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, logits.size(0), rows_per_task(logits.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.weights(args, begin, end); });
}

void row_grad(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias, double scale,
              double softcap, double inv_temperature, const at::Tensor& lse, const at::Tensor& coefficients,
              int64_t column_offset, at::Tensor out) {
  const RowInputs in = row_inputs(at::kCPU, logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  const at::Tensor lse_dense = lse.contiguous();
  const GradArgs args = grad_args(in, logits, lse_dense, coefficients, out);
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, logits.size(0), rows_per_task(logits.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.grad(args, begin, end); });
}

void row_scores_packed(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                       double scale, double inv_temperature, int64_t outputs, int64_t column_offset, at::Tensor state,
                       const at::Tensor& words, const at::Tensor& tops) {
  const RowInputs in = row_inputs(at::kCPU, logits, targets, bias, scale, 0, inv_temperature, column_offset);
  TORCH_CHECK_VALUE(logits.scalar_type() == at::kFloat, "logits: expected float32, got ", logits.scalar_type());
  const PackedRows to = packed_rows(words, tops, logits.size(1), at::kCPU);
  check_packed_rows(words, logits.size(0));
  const ScoreArgs args = score_args(in, logits, outputs, state);
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, logits.size(0), rows_per_task(logits.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.scores_packed(args, to, begin, end); });
}

void row_grad_packed(const at::Tensor& words, const std::optional<at::Tensor>& index, const at::Tensor& targets,
                     double scale, double inv_temperature, const at::Tensor& lse, const at::Tensor& coefficients,
                     int64_t column_offset, at::Tensor out, const at::Tensor& tops) {
  RowInputs in = row_inputs(at::kCPU, out, targets, std::nullopt, scale, 0, inv_temperature, column_offset);
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat, "out: expected float32, got ", out.scalar_type());
  in.tile.logits = nullptr;
  PackedRows from = packed_rows(words, tops, out.size(1), at::kCPU);
  const at::Tensor rows = packed_index(words, index, out);
  if (index) {
    TORCH_CHECK_VALUE(
        rows.numel() == 0 || (rows.min().item<int64_t>() >= 0 && rows.max().item<int64_t>() < words.size(0)),
        "index: expected rows of words, below ", words.size(0));
    from.index = rows.const_data_ptr<int64_t>();
  }
  const at::Tensor lse_dense = lse.contiguous();
  const GradArgs args = grad_args(in, out, lse_dense, coefficients, out);
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, out.size(0), rows_per_task(out.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.grad_packed(args, from, begin, end); });
}

void row_divergence(const at::Tensor& student, const std::optional<at::Tensor>& student_bias, double student_scale,
                    double student_softcap, const at::Tensor& teacher, const std::optional<at::Tensor>& teacher_bias,
                    double teacher_scale, double teacher_softcap, double inv_temperature, double teacher_part,
                    double student_part, double mixture, bool is_tvd, const at::Tensor& weights, at::Tensor results,
                    std::optional<at::Tensor> gradient) {
  const DivergenceInputs in = divergence_inputs(
      at::kCPU, student, student_bias, student_scale, student_softcap, teacher, teacher_bias, teacher_scale,
      teacher_softcap, inv_temperature, teacher_part, student_part, mixture, is_tvd, weights, results, gradient);
  const DivergenceKernels& kernels = divergence_kernels();
  at::parallel_for(0, student.size(0), rows_per_task(student.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.divergence(in.args, begin, end); });
}

// What one thread keeps of its rows, in order.
struct Samples {
  std::vector<int64_t> columns;
  std::vector<float> logprobs;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> row_samples(const at::Tensor& logits, int64_t vocab_size,
                                                           const std::optional<at::Tensor>& bias, double scale,
                                                           double softcap, double inv_temperature,
                                                           const at::Tensor& lse, const at::Tensor& offsets,
                                                           double threshold) {
  TORCH_CHECK_VALUE(logits.device().is_cpu() && logits.dim() == 3 && (logits.size(2) <= 1 || logits.stride(2) == 1),
                    "logits: expected a CPU tensor of shape (T, R, W) with contiguous rows, got ", logits.sizes());
  const int64_t rows = logits.size(1);
  TORCH_CHECK_VALUE(logits.size(0) * logits.size(2) >= vocab_size, "vocab_size: ", vocab_size,
                    " columns do not fit the logits' shape ", logits.sizes());
  check_vector(lse, "lse", rows, at::kFloat, at::kCPU);
  check_vector(offsets, "offsets", rows, at::kDouble, at::kCPU);
  const at::Tensor lse_dense = lse.contiguous(), offsets_dense = offsets.contiguous();
  at::Tensor bias_float;
  if (bias) {
    check_vector(*bias, "bias", vocab_size, bias->scalar_type(), at::kCPU);
    bias_float = bias->to(at::kFloat).contiguous();
  }
  const Transform transform = transform_of(bias_float, scale, softcap, inv_temperature);
  const SampleArgs args = {logits.const_data_ptr(),
                           dtype_of(logits, "logits"),
                           rows,
                           logits.stride(0),
                           logits.stride(1),
                           logits.size(2),
                           vocab_size,
                           transform,
                           lse_dense.const_data_ptr<float>(),
                           offsets_dense.const_data_ptr<double>(),
                           threshold};
  // Every kept entry stands for a probability of `threshold` at least, and they sum to one but for rounding.
  const int64_t capacity = static_cast<int64_t>(std::min<double>(vocab_size, 1.01 / threshold + 2));
  at::Tensor counts = at::empty({rows}, at::kLong);
  int64_t* counts_data = counts.mutable_data_ptr<int64_t>();
  std::vector<Samples> by_row(rows);
  at::parallel_for(0, rows, rows_per_task(vocab_size), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> columns(capacity);
    std::vector<float> logprobs(capacity);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t count = sparse_kernels().sample(args, row, columns.data(), logprobs.data(), capacity);
      TORCH_CHECK_VALUE(count <= capacity, "lse: row ", row, " has probabilities that sum to more than one");
      by_row[row].columns.assign(columns.begin(), columns.begin() + count);
      by_row[row].logprobs.assign(logprobs.begin(), logprobs.begin() + count);
      counts_data[row] = count;
    }
  });
  const int64_t total = counts.sum().item<int64_t>();
  at::Tensor columns = at::empty({total}, at::kLong), logprobs = at::empty({total}, at::kFloat);
  int64_t* column = columns.mutable_data_ptr<int64_t>();
  float* logprob = logprobs.mutable_data_ptr<float>();
  for (const Samples& samples : by_row) {
    column = std::copy(samples.columns.begin(), samples.columns.end(), column);
    logprob = std::copy(samples.logprobs.begin(), samples.logprobs.end(), logprob);
  }
  return {counts, columns, logprobs};
}

// Checks that the entries of rows lie among `entries`, in order, and that each names one of `dense_rows`.
void check_sparse_rows(const at::Tensor& row_offsets, const at::Tensor& indices, int64_t dense_rows) {
  const int64_t entries = indices.numel(), last = row_offsets.numel() - 1;
  TORCH_CHECK_VALUE(last >= 0, "row_offsets: expected at least one number, got none");
  const int64_t* offsets = row_offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(offsets[0] >= 0 && offsets[last] <= entries && std::is_sorted(offsets, offsets + last + 1),
                    "row_offsets: expected rising numbers from 0 to ", entries, ", the number of indices");
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const bool inside = std::all_of(index, index + entries, [&](int64_t i) { return i >= 0 && i < dense_rows; });
  TORCH_CHECK_VALUE(inside, "indices: expected rows of dense, in [0, ", dense_rows, ")");
}

at::Tensor sparse_product(const at::Tensor& row_offsets, const at::Tensor& indices, const at::Tensor& values,
                          const at::Tensor& dense, at::ScalarType dtype) {
  check_rows(dense, "dense", at::kCPU);
  check_vector(row_offsets, "row_offsets", row_offsets.numel(), at::kLong, at::kCPU);
  check_vector(indices, "indices", indices.numel(), at::kLong, at::kCPU);
  check_vector(values, "values", indices.numel(), at::kFloat, at::kCPU);
  const at::Tensor dense_row_offsets = row_offsets.contiguous(), dense_indices = indices.contiguous();
  const at::Tensor dense_values = values.contiguous();
  check_sparse_rows(dense_row_offsets, dense_indices, dense.size(0));
  const int64_t rows = row_offsets.numel() - 1, width = dense.size(1);
  at::Tensor out = at::empty({rows, width}, dense.options().dtype(dtype));
  const ProductArgs args = {dense_row_offsets.const_data_ptr<int64_t>(),
                            dense_indices.const_data_ptr<int64_t>(),
                            dense_values.const_data_ptr<float>(),
                            dense.const_data_ptr(),
                            dtype_of(dense, "dense"),
                            dense.stride(0),
                            width,
                            out.mutable_data_ptr(),
                            dtype_of(out, "dtype"),
                            width};
  at::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(width + 64);
    sparse_kernels().product(args, begin, end, scratch.data());
  });
  return out;
}

at::Tensor pooled_empty(at::IntArrayRef size, at::ScalarType dtype) {
  return at::detail::empty_generic(size, memory_pool(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   c10::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "row_weights(Tensor logits, Tensor targets, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "int outputs, int column_offset, Tensor(a!) state, Tensor(b!) out) -> ()");
  m.def(
      "row_samples(Tensor logits, int vocab_size, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "Tensor lse, Tensor offsets, float threshold) -> (Tensor, Tensor, Tensor)");
  m.def("sparse_product(Tensor row_offsets, Tensor indices, Tensor values, Tensor dense, ScalarType dtype) -> Tensor");
  m.def("pooled_empty(SymInt[] size, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(trl_fast, CompositeExplicitAutograd, m) { m.impl("pooled_empty", &pooled_empty); }

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("row_scores", &row_scores);
  m.impl("row_weights", &row_weights);
  m.impl("row_grad", &row_grad);
  m.impl("row_scores_packed", &row_scores_packed);
  m.impl("row_grad_packed", &row_grad_packed);
  m.impl("row_divergence", &row_divergence);
  m.impl("row_samples", &row_samples);
  m.impl("sparse_product", &sparse_product);
}

}  // namespace trl_fast
