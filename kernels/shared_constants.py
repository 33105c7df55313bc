"""Lists the numbers that the kernels in C++, CUDA, Triton and PyTorch share.

The extension exports the numbers that it was compiled with under the same names (`shared_constants` of
csrc/bindings.cpp); `trl_fast/ops/backends.py` compares them when it loads the extension. Triton kernels take theirs
from here.
"""

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

SHARED_CONSTANTS = {name: value for name, value in dict(globals()).items() if name.isupper()}
