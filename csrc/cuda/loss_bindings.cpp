// Registers the CUDA loss kernels as torch.ops.trl_fast.*; trl_fast/ops/pair_loss.py and policy_loss.py check the
// arguments, which are contiguous vectors on one device, and allocate what is filled here.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/loss_kernels.h"

namespace trl_fast {
namespace {

const float* floats(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

int64_t stride_of(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->stride(0) : 0; }

void pair_loss_forward(const at::Tensor& logprobs, const at::Tensor& cu_seqlens, const at::Tensor& ref_logprobs,
                       const at::Tensor& lengths, int64_t loss, double beta, double label_smoothing,
                       double discopop_tau, at::Tensor losses, at::Tensor sequence_logprobs, at::Tensor gradients) {
  const PairLossArgs args = {logprobs.const_data_ptr<float>(),     cu_seqlens.const_data_ptr<int64_t>(),
                             ref_logprobs.const_data_ptr<float>(), lengths.const_data_ptr<int64_t>(),
                             static_cast<PairLoss>(loss),          static_cast<float>(beta),
                             static_cast<float>(label_smoothing),  static_cast<float>(discopop_tau),
                             losses.mutable_data_ptr<float>(),     sequence_logprobs.mutable_data_ptr<float>(),
                             gradients.mutable_data_ptr<float>()};
  const c10::cuda::CUDAGuard guard(logprobs.device());
  cuda::launch_pair_loss(args, losses.size(0), c10::cuda::getCurrentCUDAStream());
}

void pair_loss_backward_out(const at::Tensor& gradients, const at::Tensor& cu_seqlens,
                            const std::optional<at::Tensor>& grad_losses,
                            const std::optional<at::Tensor>& grad_sequence_logprobs, at::Tensor out) {
  const PairLossBackwardArgs args = {gradients.const_data_ptr<float>(),
                                     cu_seqlens.const_data_ptr<int64_t>(),
                                     floats(grad_losses),
                                     stride_of(grad_losses),
                                     floats(grad_sequence_logprobs),
                                     stride_of(grad_sequence_logprobs),
                                     out.mutable_data_ptr<float>()};
  const c10::cuda::CUDAGuard guard(gradients.device());
  cuda::launch_pair_loss_backward(args, gradients.size(0) / 2, out.size(0), c10::cuda::getCurrentCUDAStream());
}

void policy_loss_forward(const at::Tensor& logprobs, const std::optional<at::Tensor>& old_logprobs,
                         const std::optional<at::Tensor>& ref_logprobs, const at::Tensor& advantages,
                         const at::Tensor& branch, const at::Tensor& weights, int64_t loss, double beta, double lower,
                         double upper, double delta, double temperature_pos, double temperature_neg,
                         bool bias_correct_kl, double max_log_ratio, at::Tensor partial_sums, at::Tensor kl,
                         at::Tensor clipped, at::Tensor gradients) {
  const PolicyLossArgs args = {logprobs.const_data_ptr<float>(),
                               floats(old_logprobs),
                               floats(ref_logprobs),
                               advantages.const_data_ptr<float>(),
                               branch.const_data_ptr<int64_t>(),
                               weights.const_data_ptr<float>(),
                               logprobs.size(0),
                               static_cast<PolicyLoss>(loss),
                               bias_correct_kl,
                               static_cast<float>(beta),
                               static_cast<float>(lower),
                               static_cast<float>(upper),
                               static_cast<float>(delta),
                               static_cast<float>(temperature_pos),
                               static_cast<float>(temperature_neg),
                               static_cast<float>(max_log_ratio),
                               partial_sums.mutable_data_ptr<float>(),
                               ref_logprobs ? kl.mutable_data_ptr<float>() : nullptr,
                               clipped.mutable_data_ptr<int8_t>(),
                               gradients.mutable_data_ptr<float>()};
  TORCH_CHECK_VALUE(partial_sums.size(0) == policy_loss_blocks(logprobs.size(0)), "partial_sums: expected ",
                    policy_loss_blocks(logprobs.size(0)), " sums, got ", partial_sums.size(0));
  const c10::cuda::CUDAGuard guard(logprobs.device());
  cuda::launch_policy_loss(args, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "pair_loss_forward(Tensor logprobs, Tensor cu_seqlens, Tensor ref_logprobs, Tensor lengths, int loss, "
      "float beta, float label_smoothing, float discopop_tau, Tensor(a!) losses, Tensor(b!) sequence_logprobs, "
      "Tensor(c!) gradients) -> ()");
  m.def(
      "pair_loss_backward_out(Tensor gradients, Tensor cu_seqlens, Tensor? grad_losses, Tensor? "
      "grad_sequence_logprobs, "
      "Tensor(a!) out) -> ()");
  m.def(
      "policy_loss_forward(Tensor logprobs, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor advantages, "
      "Tensor branch, Tensor weights, int loss, float beta, float lower, float upper, float delta, "
      "float temperature_pos, float temperature_neg, bool bias_correct_kl, float max_log_ratio, "
      "Tensor(a!) partial_sums, Tensor(b!) kl, Tensor(c!) clipped, Tensor(d!) gradients) -> ()");
}

TORCH_LIBRARY_IMPL(trl_fast, CUDA, m) {
  m.impl("pair_loss_forward", &pair_loss_forward);
  m.impl("pair_loss_backward_out", &pair_loss_backward_out);
  m.impl("policy_loss_forward", &policy_loss_forward);
}

}  // namespace trl_fast
