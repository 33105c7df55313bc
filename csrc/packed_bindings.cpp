// torch.ops.trl_fast.pack_rows and unpack_rows: every check by name.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/packed_kernels.h"
#include "row_arguments.h"

namespace trl_fast {
namespace {

PackArgs pack_args(const at::Tensor& logits, const at::Tensor& packed, double step) {
  check_rows(logits, "logits", at::kCPU);
  check_rows(packed, "packed", at::kCPU);
  TORCH_CHECK_VALUE(logits.scalar_type() == at::kFloat, "logits: expected float32, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kShort, "packed: expected int16, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.size(1) >= packed_columns(logits.size(1)), "packed: expected at least ",
                    packed_columns(logits.size(1)), " columns for logits of shape ", logits.sizes(), ", got ",
                    packed.sizes());
  TORCH_CHECK_VALUE(step > 0, "step: expected a positive number, got ", step);
  return {static_cast<float*>(logits.data_ptr()),
          logits.stride(0),
          logits.size(1),
          static_cast<uint16_t*>(packed.data_ptr()),
          packed.stride(0),
          nullptr,
          static_cast<float>(step)};
}

void pack_rows(const at::Tensor& logits, double step, at::Tensor packed) {
  const PackArgs args = pack_args(logits, packed, step);
  TORCH_CHECK_VALUE(packed.size(0) == logits.size(0), "packed: expected ", logits.size(0), " rows, got ",
                    packed.size(0));
  at::parallel_for(0, logits.size(0), rows_per_task(args.columns),
                   [&](int64_t begin, int64_t end) { packed_kernels().pack(args, begin, end); });
}

void unpack_rows(const at::Tensor& packed, const std::optional<at::Tensor>& index, double step, at::Tensor logits) {
  PackArgs args = pack_args(logits, packed, step);
  at::Tensor rows;
  if (index) {
    check_vector(*index, "index", logits.size(0), at::kLong, at::kCPU);
    rows = index->contiguous();
    TORCH_CHECK_VALUE(
        rows.numel() == 0 || (rows.min().item<int64_t>() >= 0 && rows.max().item<int64_t>() < packed.size(0)),
        "index: expected rows of packed, below ", packed.size(0));
    args.index = rows.const_data_ptr<int64_t>();
  } else {
    TORCH_CHECK_VALUE(packed.size(0) == logits.size(0), "packed: expected ", logits.size(0), " rows, got ",
                      packed.size(0));
  }
  at::parallel_for(0, logits.size(0), rows_per_task(args.columns),
                   [&](int64_t begin, int64_t end) { packed_kernels().unpack(args, begin, end); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def("pack_rows(Tensor logits, float step, Tensor(a!) packed) -> ()");
  m.def("unpack_rows(Tensor packed, Tensor? index, float step, Tensor(a!) logits) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CPU, m) {
  m.impl("pack_rows", &pack_rows);
  m.impl("unpack_rows", &unpack_rows);
}

}  // namespace trl_fast
