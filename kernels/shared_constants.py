"""Lists the numbers that the kernels in C++, CUDA, Triton and PyTorch share.

The extension exports the numbers that it was compiled with under the same names (`shared_constants` of
csrc/bindings.cpp); `trl_fast/ops/backends.py` compares them when it loads the extension. Triton kernels take theirs
from here.
"""

from typing import Literal, get_args

# Bits of the row kernels' `outputs` mask; trl_fast/ops/token_scores.py names the outputs.
ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1 = 1, 2, 4, 8

# Rows of a tile's running state (7, R) float64; trl_fast/ops/head/row_kernels.py explains them.
TOP, SUM, SUM_X, SUM_SQ, TOTAL, TARGET, BEFORE = range(7)
NUM_STATES = 7
# Rows a, b, d, e of the coefficients (4, R) of a gradient.
NUM_COEFFICIENTS = 4

# Packed logits; trl_fast/ops/head/kept_logits.py specifies the format.
PACKED_CHUNK = 2048
PACKED_STEPS_A_NAT = 1024
PACKED_LOWEST_CODE = 65534
PACKED_MINUS_INF_CODE = 65535

# Tokens whose terms one block of the policy loss's kernel sums.
POLICY_LOSS_BLOCK = 1024

# Names of what layers compute; kernels are given a name's place.
NormCast = Literal["llama", "gemma", "olmo"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
Pairs = Literal["halves", "adjacent", "adjacent_to_halves"]
NORM_CASTS: tuple[NormCast, ...] = get_args(NormCast)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
PAIRS: tuple[Pairs, ...] = get_args(Pairs)

# Sums of a weight's gradient, each a row of partial sums. The C++ kernels sum so many rows of a norm into one, or so
# many tokens with all their heads. Each worker of a GPU, of which there are enough to fill one, leaves one.
NORM_BLOCK, TOKEN_BLOCK = 64, 16
FEWEST_WORKERS, NUMBERS_OF_WORKERS = 256, 2**20

# Tensors of fewer bytes do not come from the memory pool: of its huge pages, 2 MiB each, they would waste too much.
POOLED_FROM_BYTES = 8 << 20

# Rows of logits of a tile of the kernel that is made with CUTLASS, and columns of a part of one.
FUSED_ROWS, FUSED_PART_COLUMNS = 128, 64

SHARED_CONSTANTS = {name: value for name, value in dict(globals()).items() if name.isupper()}
