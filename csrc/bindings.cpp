// Registers the C++ kernels as torch.ops.trl_fast.* and tells, through pybind11, how they were built.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/row_kernels.h"
#include "cpu/sparse_kernels.h"

namespace trl_fast {
namespace {

Dtype dtype_of(const at::Tensor& tensor, const char* name = "logits") {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, name, ": expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

void check_vector(const at::Tensor& tensor, const char* name, int64_t size, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, ": expected a CPU tensor, got one on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected shape (", size, ",), got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", got ", tensor.scalar_type());
}

void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, ": expected a CPU tensor, got one on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, ": expected shape (R, C), got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, ": expected contiguous rows, got strides ",
                    tensor.strides());
}

// Block and Transform point into these; they keep what had to be made contiguous or float alive.
struct Inputs {
  at::Tensor targets;
  at::Tensor bias;
  Block block;
  Transform transform;
};

Inputs gather_inputs(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                     double scale, double softcap, double inv_temperature, int64_t column_offset) {
  check_rows(logits, "logits");
  check_vector(targets, "targets", logits.size(0), at::kLong);
  Inputs in;
  in.targets = targets.contiguous();
  if (bias) {
    check_vector(*bias, "bias", logits.size(1), bias->scalar_type());
    in.bias = bias->to(at::kFloat).contiguous();
  }
  in.block = {logits.const_data_ptr(),
              dtype_of(logits),
              logits.stride(0),
              logits.size(1),
              in.targets.const_data_ptr<int64_t>(),
              column_offset};
  in.transform = {bias ? in.bias.const_data_ptr<float>() : nullptr, static_cast<float>(scale),
                  static_cast<float>(softcap), static_cast<float>(inv_temperature)};
  return in;
}

int64_t rows_per_task(int64_t columns) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, columns));
}

void row_scores(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                double scale, double softcap, double inv_temperature, int64_t outputs, int64_t column_offset,
                at::Tensor state) {
  const Inputs in = gather_inputs(logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  const int64_t rows = logits.size(0);
  TORCH_CHECK_VALUE(state.device().is_cpu() && state.dim() == 2 && state.size(0) == kNumStates &&
                        state.size(1) == rows && (rows <= 1 || state.stride(1) == 1) &&
                        state.scalar_type() == at::kDouble,
                    "state: expected a float64 CPU tensor of shape (", static_cast<int>(kNumStates), ", ", rows,
                    ") with contiguous rows, got ", state.sizes(), " ", state.scalar_type());
  const ScoreArgs args = {in.block, in.transform, outputs, state.mutable_data_ptr<double>(), state.stride(0)};
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, rows, rows_per_task(logits.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.scores(args, begin, end); });
}

void row_grad(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& bias, double scale,
              double softcap, double inv_temperature, const at::Tensor& lse, const at::Tensor& coefficients,
              int64_t column_offset, at::Tensor out) {
  const Inputs in = gather_inputs(logits, targets, bias, scale, softcap, inv_temperature, column_offset);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_rows(out, "out");
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type(),
                    "out: expected shape and dtype of logits, ", logits.sizes(), " ", logits.scalar_type(), ", got ",
                    out.sizes(), " ", out.scalar_type());
  check_vector(lse, "lse", rows, at::kFloat);
  TORCH_CHECK_VALUE(coefficients.dim() == 2 && coefficients.size(0) == 4 && coefficients.size(1) == rows &&
                        coefficients.is_contiguous() && coefficients.scalar_type() == at::kFloat,
                    "coefficients: expected a contiguous float32 tensor of shape (4, ", rows, "), got ",
                    coefficients.sizes(), " ", coefficients.scalar_type());
  const at::Tensor lse_dense = lse.contiguous();
  const GradArgs args = {in.block,
                         in.transform,
                         lse_dense.const_data_ptr<float>(),
                         coefficients.const_data_ptr<float>(),
                         rows,
                         out.mutable_data_ptr(),
                         out.stride(0)};
  const RowKernels& kernels = row_kernels();
  at::parallel_for(0, rows, rows_per_task(columns),
                   [&](int64_t begin, int64_t end) { kernels.grad(args, begin, end); });
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
  check_vector(lse, "lse", rows, at::kFloat);
  check_vector(offsets, "offsets", rows, at::kDouble);
  const at::Tensor lse_dense = lse.contiguous(), offsets_dense = offsets.contiguous();
  at::Tensor bias_float;
  if (bias) {
    check_vector(*bias, "bias", vocab_size, bias->scalar_type());
    bias_float = bias->to(at::kFloat).contiguous();
  }
  const Transform transform = {bias ? bias_float.const_data_ptr<float>() : nullptr, static_cast<float>(scale),
                               static_cast<float>(softcap), static_cast<float>(inv_temperature)};
  const SampleArgs args = {logits.const_data_ptr(),
                           dtype_of(logits),
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

at::Tensor sparse_product(const at::Tensor& starts, const at::Tensor& indices, const at::Tensor& values,
                          const at::Tensor& dense, at::ScalarType dtype) {
  check_rows(dense, "dense");
  check_vector(starts, "starts", starts.numel(), at::kLong);
  check_vector(indices, "indices", indices.numel(), at::kLong);
  check_vector(values, "values", indices.numel(), at::kFloat);
  const at::Tensor dense_starts = starts.contiguous(), dense_indices = indices.contiguous();
  const at::Tensor dense_values = values.contiguous();
  const int64_t rows = starts.numel() - 1, width = dense.size(1);
  at::Tensor out = at::empty({rows, width}, dense.options().dtype(dtype));
  const ProductArgs args = {dense_starts.const_data_ptr<int64_t>(),
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

pybind11::dict build_info() {
  pybind11::dict info;
  info["isas"] = compiled_isas();
  info["isa"] = chosen_isa();
  info["compiler"] = __VERSION__;
  info["torch_version"] = TORCH_VERSION;
#ifdef TRL_FAST_HAS_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "row_scores(Tensor logits, Tensor targets, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "int outputs, int column_offset, Tensor(a!) state) -> ()");
  m.def(
      "row_grad(Tensor logits, Tensor targets, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "Tensor lse, Tensor coefficients, int column_offset, Tensor(a!) out) -> ()");
  m.def(
      "row_samples(Tensor logits, int vocab_size, Tensor? bias, float scale, float softcap, float inv_temperature, "
      "Tensor lse, Tensor offsets, float threshold) -> (Tensor, Tensor, Tensor)");
  m.def("sparse_product(Tensor starts, Tensor indices, Tensor values, Tensor dense, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("row_scores", &row_scores);
  m.impl("row_grad", &row_grad);
  m.impl("row_samples", &row_samples);
  m.impl("sparse_product", &sparse_product);
}

}  // namespace trl_fast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &trl_fast::build_info, "How this extension was built and which instruction set it runs.");
}
