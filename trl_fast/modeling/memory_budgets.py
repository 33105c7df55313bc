"""Says how much memory a trainer's step takes by default where it could take more or less, with the same results.

A step is not to need more memory than TRL's step on the same rows. So nothing here is larger than something that TRL's
step has, where ours has not, or later. It depends on the problem alone: what is free has no say in how sums are split,
so that a run gives the same bits beside other processes.
"""

from __future__ import annotations

import torch

from trl_fast.ops.device import DeviceFacts, device_facts

# Rows of a tile of TRL 1.16's logits. On a CPU each row of 32768 float32 logits has seven such rows beside it in
# backward, 960 KiB in all: the head's workspace and what checkpointing keeps share that.
_TILE_ROWS_OF_TRL = 4096
_ROW_BYTES_ON_CPU = 384 << 10
_MOST_BYTES = 1 << 30
# Rows of float32 logits that a workspace has room for, however few rows are scored.
_LEAST_ROWS = 16


def head_workspace(num_rows: int, weight: torch.Tensor, facts: DeviceFacts) -> int | None:
    """Returns the bytes of the head's workspace for `num_rows` rows and a weight (V, H); None: the op's own choice."""
    if facts.kind != "cpu":
        return None
    size = min(min(num_rows, _TILE_ROWS_OF_TRL) * _ROW_BYTES_ON_CPU, _MOST_BYTES)
    return max(size, _LEAST_ROWS * 4 * weight.shape[0])


def default_activation_budget(hidden: torch.Tensor) -> int:
    """Returns the bytes of results that checkpointing keeps in a forward pass where all layers are checkpointed.

    On GPUs none: there only what is free is spent. hidden: the first layer's hidden states (B, T, H).
    """
    if device_facts(hidden.device).kind != "cpu":
        return 0
    return min(hidden.shape[:-1].numel() * _ROW_BYTES_ON_CPU, _MOST_BYTES)
