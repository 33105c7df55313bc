// The kernels of layers, for one instruction set; CPU_CAPABILITY is its name (DEFAULT, AVX2, AVX512).
//
// Numbers are rounded to the tensors' dtype where transformers' code rounds them, forward and backward.
#include "layer_kernels.h"

#include "layer_embeddings.h"
#include "layer_gates.h"
#include "layer_norms.h"
#include "layer_rotations.h"

namespace trl_fast {

extern const LayerKernels TRL_FAST_JOIN(kLayerKernels, CPU_CAPABILITY);
const LayerKernels TRL_FAST_JOIN(kLayerKernels, CPU_CAPABILITY) = {
    norm, norm_backward, gate_of, gate_backward_of, rotary, norm_rotary, norm_rotary_backward, embedding_gradient,
};

}  // namespace trl_fast
