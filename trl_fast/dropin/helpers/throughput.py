"""Estimates a training step's floating-point operations and the share of the hardware's that it reaches."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from trl_fast.data.layer_sizes import head_width

logger = logging.getLogger(__name__)

# Dense operations a second by part of the device's name, longer names before their beginnings: the vendors' data
# sheets. (bfloat16, float16); None where the device has no such products.
_PEAK_FLOPS: dict[str, tuple[float | None, float | None]] = {
    "GB300": (2.5e15, None),
    "GB200": (2.5e15, None),
    "B300": (2.25e15, None),
    "B200": (2.25e15, None),
    "H100 NVL": (835e12, 835e12),
    "H100 PCIe": (756e12, 756e12),
    "H100": (989e12, 989e12),
    "H200 NVL": (835e12, 835e12),
    "H200": (989e12, 989e12),
    "H20": (148e12, 148e12),
    "RTX PRO 6000": (500e12, 500e12),
    "A100": (312e12, 312e12),
    "A6000": (154.85e12, 154.85e12),
    "A10G": (125e12, 125e12),
    "A10": (125e12, 125e12),
    "L40S": (362e12, 362e12),
    "L4": (121e12, 121e12),
    "T4": (None, 65e12),
    "MI355X": (2500e12, None),
    "MI325X": (1300e12, None),
    "MI300X": (1300e12, None),
    "MI250X": (191.5e12, None),
}


def _head_size(config: Any) -> int:
    return head_width(config) or config.hidden_size // config.num_attention_heads


def _attention_score_flops(config: Any, seq_len: int) -> int:
    """Counts those of a token in one layer, forward: its scores with seq_len tokens, and the sum of their values."""
    return 2 * 2 * config.num_attention_heads * _head_size(config) * seq_len


def compute_flops_per_token(config: PretrainedConfig, seq_len: int) -> int:
    """Estimates a token's operations in forward and backward (three times forward), each token attending to seq_len.

    Layers of experts count their active experts and the router.
    """
    sizes: Any = config
    hidden, layers = sizes.hidden_size, sizes.num_hidden_layers
    heads, shared = sizes.num_attention_heads, sizes.num_key_value_heads
    projections = 2 * hidden * _head_size(sizes) * (2 * heads + 2 * shared)
    attention = projections + _attention_score_flops(sizes, seq_len)
    dense = 2 * 3 * hidden * sizes.intermediate_size
    active = getattr(sizes, "num_experts_per_tok", None)
    if active is None:
        mlps = layers * dense
    else:
        experts = active * 2 * 3 * hidden * sizes.moe_intermediate_size + 2 * hidden * sizes.num_local_experts
        sparse = len(range(0, layers, sizes.decoder_sparse_step))
        mlps = sparse * experts + (layers - sparse) * dense
    return 3 * (layers * attention + mlps + 2 * sizes.vocab_size * hidden)


def compute_mfu(
    flops_per_token: int, tokens_per_second: float, world_size: int, peak_flops_per_device: float
) -> float:
    """Computes the share, in percent, of the operations that world_size devices could do."""
    return 100 * (flops_per_token * tokens_per_second) / (peak_flops_per_device * world_size)


def adjusted_mfu(mfu: float, config: PretrainedConfig, seq_len: int) -> float:
    """Returns the share that compute_mfu gives when causal attention counts half its scores, as it computes them."""
    whole = compute_flops_per_token(config, seq_len)
    sizes: Any = config
    left_out = sizes.num_hidden_layers * 3 * _attention_score_flops(sizes, seq_len) // 2
    return mfu * (whole - left_out) / whole


def get_peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns the dense operations a second of a device in a dtype, by the data sheet; None where not known."""
    for name, (bfloat16, float16) in _PEAK_FLOPS.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            return {"bfloat16": bfloat16, "float16": float16}.get(dtype)
    return None


def get_peak_flops_per_device(accelerator: Accelerator, dtype: str) -> float | None:
    """Returns get_peak_flops of the GPU that accelerate trains on; None, and a line, where they are not known."""
    peak = get_peak_flops(torch.cuda.get_device_name(accelerator.device), dtype)
    if peak is None:
        logger.info("The peak operations a second of this device or dtype are not known, so neither is the MFU.")
    return peak
