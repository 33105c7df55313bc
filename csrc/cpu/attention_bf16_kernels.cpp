// Attention over a row of token trees in bfloat16, by tiles of AMX (CPU_CAPABILITY is AMX) or emulated ones
// (EMULATED_AMX); heads of other dtypes are left to the kernels of AVX-512 or of the baseline.
//
// The algorithm is that of attention_kernels.cpp. What is multiplied is rounded to bfloat16: queries and keys as they
// are, weights, and the gradient of scores; sums are float32.
#include "attention_bf16_backward.h"
#include "attention_bf16_forward.h"

namespace trl_fast {

#if defined(CPU_CAPABILITY_AMX)
extern const AttentionKernels kAttentionKernelsAVX512;
#define TRL_FAST_OTHERS kAttentionKernelsAVX512
#else
extern const AttentionKernels kAttentionKernelsDEFAULT;
#define TRL_FAST_OTHERS kAttentionKernelsDEFAULT
#endif

namespace {

// One of two functions by the dtype of `args`: the one above, or the member of the kernels for other dtypes.
template <auto kOwn, auto kMember, typename Result, typename... Rest>
Result by_dtype(const AttentionArgs& args, Rest... rest) {
  return args.dtype == Dtype::kBFloat16 ? kOwn(args, rest...) : (TRL_FAST_OTHERS.*kMember)(args, rest...);
}

}  // namespace

extern const AttentionKernels TRL_FAST_JOIN(kAttentionKernels, CPU_CAPABILITY);
const AttentionKernels TRL_FAST_JOIN(kAttentionKernels, CPU_CAPABILITY) = {
    by_dtype<scratch_of<forward_room>, &AttentionKernels::forward_scratch, int64_t>,
    by_dtype<scratch_of<backward_room>, &AttentionKernels::backward_scratch, int64_t>,
    by_dtype<::packed_keys_size, &AttentionKernels::packed_keys_size, int64_t>,
    by_dtype<::packed_values_size, &AttentionKernels::packed_values_size, int64_t>,
    by_dtype<::pack, &AttentionKernels::pack, void>,
    by_dtype<::forward, &AttentionKernels::forward, void>,
    by_dtype<::prepare_backward, &AttentionKernels::prepare_backward, void>,
    by_dtype<::backward, &AttentionKernels::backward, void>,
};

}  // namespace trl_fast
