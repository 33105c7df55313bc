// Registers the attention of a row by varlen flash kernels, with its backward pass in C++.
//
// trl_fast/modeling/attention/varlen.py says what is computed, call by call, and has it in Python too, for attention
// sinks and for what the extension's merge does not serve. This does the same without Python in between. The kernels
// are torch's, found by its dispatcher: those that FlashAttention 3 has put in their place, too.
#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

#include <vector>

#include "autograd_support.h"

namespace trl_fast {
namespace {

// Tokens of a row: a range, or an index (N).
struct Places {
  int64_t start, stop;
  OptionalTensor index;

  // Their rows of x (T, ...).
  at::Tensor of(const at::Tensor& x) const { return index ? x.index_select(0, *index) : x.slice(0, start, stop); }

  // Adds numbers (N, ...) to their rows of a sum; no place is there twice.
  void add(const at::Tensor& sum, const at::Tensor& part) const {
    if (index) {
      sum.index_add_(0, *index, part.to(sum.scalar_type()));
    } else {
      sum.slice(0, start, stop).add_(part);
    }
  }
};

// What a call of the flash kernels is told of its sequences, as `_Varlen` of varlen.py.
struct VarlenCall {
  Places queries, keys;
  at::Tensor cu_seqlens_q, cu_seqlens_k;
  OptionalTensor query_of;
  int64_t longest_query, longest_key;
  bool causal;
  std::optional<int64_t> window_left, window_right;
};

// The calls that attend a row.
struct VarlenRow : torch::CustomClassHolder {
  // tensors and numbers: as `told_in_cpp` of varlen.py lists them, call by call.
  VarlenRow(const c10::List<OptionalTensor>& tensors, at::IntArrayRef numbers) {
    constexpr size_t kTensors = 5, kNumbers = 8;
    for (size_t i = 0; i < numbers.size() / kNumbers; ++i) {
      const int64_t* const n = &numbers[kNumbers * i];
      const auto tensor = [&](size_t k) -> OptionalTensor { return tensors.get(kTensors * i + k); };
      const bool slides = n[7] > 0;
      calls.push_back({{n[0], n[1], tensor(0)},
                       {n[2], n[3], tensor(1)},
                       *tensor(2),
                       *tensor(3),
                       tensor(4),
                       n[4],
                       n[5],
                       n[6] != 0,
                       slides ? std::optional<int64_t>(n[7] - 1) : std::nullopt,
                       slides ? std::optional<int64_t>(0) : std::nullopt});
    }
  }

  std::vector<VarlenCall> calls;
};

// (1, heads, T, D) as the kernels take it, (T, heads, D).
at::Tensor by_tokens(const at::Tensor& x) { return x.select(0, 0).transpose(0, 1); }

at::Tensor by_heads(const at::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); }

// Sums (T, ...) float32 of gradients (N, ...) of tokens, some of which were taken several times.
at::Tensor gathered_back(const at::Tensor& grad, const at::Tensor& index, int64_t tokens) {
  std::vector<int64_t> shape = grad.sizes().vec();
  shape[0] = tokens;
  return at::zeros(shape, grad.options().dtype(at::kFloat)).index_add_(0, index, grad.to(at::kFloat));
}

class VarlenAttention : public Function<VarlenAttention> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const c10::intrusive_ptr<VarlenRow>& row, double scale) {
    static const auto merge =
        kernel<Both(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
            "trl_fast::merge_attention");
    const at::Tensor q = by_tokens(query), k = by_tokens(key), v = by_tokens(value);
    at::Tensor out, lse;
    variable_list states;
    for (const VarlenCall& call : row->calls) {
      const auto [found, found_lse, state, unused, mask] = at::_flash_attention_forward(
          call.queries.of(q).contiguous(), call.keys.of(k).contiguous(), call.keys.of(v).contiguous(),
          call.cu_seqlens_q, call.cu_seqlens_k, call.longest_query, call.longest_key, 0.0, call.causal, false, scale,
          call.window_left, call.window_right);
      states.insert(states.end(), {state, unused});
      if (call.query_of) {
        std::tie(out, lse) = merge.call(out, lse, found, found_lse, *call.query_of);
      } else {
        out = found;
        lse = found_lse;
      }
    }
    const at::Tensor result = by_heads(out);
    // All tensors, so that checkpointing lets go of them.
    variable_list kept = {query, key, value, result, lse};
    kept.insert(kept.end(), states.begin(), states.end());
    ctx->saved_data["row"] = c10::IValue::make_capsule(row);
    ctx->saved_data["scale"] = scale;
    ctx->save_for_backward(std::move(kept));
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_derivative("attention of token trees");
    const auto row = c10::static_intrusive_pointer_cast<VarlenRow>(ctx->saved_data["row"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor q = by_tokens(saved[0]), k = by_tokens(saved[1]), v = by_tokens(saved[2]),
                     out = by_tokens(saved[3]), grad = by_tokens(grads[0]);
    at::Tensor sums[3];
    for (size_t n = 0; const VarlenCall& call : row->calls) {
      const at::Tensor lse = call.queries.index ? saved[4].index_select(1, *call.queries.index)
                                                : saved[4].slice(1, call.queries.start, call.queries.stop);
      const auto [by_q, by_k, by_v] = at::_flash_attention_backward(
          call.queries.of(grad).contiguous(), call.queries.of(q).contiguous(), call.keys.of(k).contiguous(),
          call.keys.of(v).contiguous(), call.queries.of(out).contiguous(), lse.contiguous(), call.cu_seqlens_q,
          call.cu_seqlens_k, call.longest_query, call.longest_key, 0.0, call.causal, saved[5 + 2 * n],
          saved[6 + 2 * n], ctx->saved_data["scale"].toDouble(), call.window_left, call.window_right);
      if (call.query_of) {
        call.queries.add(sums[0], by_q);
        call.keys.add(sums[1], by_k);
        call.keys.add(sums[2], by_v);
      } else {
        // Its queries are the row, and so are its keys, unless some are there several times.
        const auto& index = call.keys.index;
        sums[0] = by_q;
        sums[1] = index ? gathered_back(by_k, *index, k.size(0)) : by_k;
        sums[2] = index ? gathered_back(by_v, *index, v.size(0)) : by_v;
      }
      ++n;
    }
    variable_list found(5);
    for (size_t i = 0; i < 3; ++i) found[i] = by_heads(sums[i]).to(grad.scalar_type());
    return found;
  }
};

at::Tensor varlen_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const c10::List<OptionalTensor>& tensors, at::IntArrayRef numbers, double scale) {
  return VarlenAttention::apply(query, key, value, c10::make_intrusive<VarlenRow>(tensors, numbers), scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trl_fast, m) {
  m.def(
      "eager_varlen_attention(Tensor query, Tensor key, Tensor value, Tensor?[] tensors, int[] numbers, float scale) "
      "-> Tensor",
      &varlen_attention);
}

}  // namespace trl_fast
