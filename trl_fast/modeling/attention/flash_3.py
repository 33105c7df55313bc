"""Has torch's flash operators computed by FlashAttention 3, where its package is installed for a Hopper GPU.

torch >= 2.11 takes its kernels in the place of its own, for the same operators and with the same results. It is a
switch of the whole process, which is put back when the model that asked for it is given its own attention back.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch.nn import attention as torch_attention

from trl_fast.input_errors import error_line
from trl_fast.ops.device import device_facts

from .row_attention import AttentionSpec, RowMask
from .varlen import CudaRowAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Set to 0, it keeps torch's own kernels.
ENVIRONMENT_VARIABLE = "TRL_FAST_FA3"
IMPLEMENTATION, PACKAGE = "FA3", "flash_attn_interface"
_CAPABILITY = (9, 0)
# A row on which both are compared, and the relative error in the 2-norm that bfloat16's rounding may come to.
_TRIAL = RowMask(((140, 30, (12, 7, 9)), (40,)), runs=((20, 90),))
_TRIAL_ERROR = 0.02


def flash_3_serves(device: torch.device) -> tuple[bool, str]:
    """Returns whether FlashAttention 3 is installed for a device, and why it is not used."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return False, f"{ENVIRONMENT_VARIABLE}=0 is set"
    capability = device_facts(device).capability
    if capability != _CAPABILITY:
        return False, "it is for GPUs of compute capability 9.0 (Hopper)"
    if IMPLEMENTATION not in torch_attention.list_flash_attention_impls():
        return False, f"torch {torch.__version__} does not know it"
    if importlib.util.find_spec(PACKAGE) is None:
        return False, f"the package {PACKAGE} is not installed"
    return True, f"torch's flash operators are computed by {PACKAGE}"


def use_flash_3(model: PreTrainedModel) -> bool:
    """Returns whether FlashAttention 3 was switched on for a model; it is tried out first.

    It is not where somebody has chosen an implementation already, and with attention dropout, which it lacks.
    """
    config = model.config.get_text_config()
    has_dropout = any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop"))
    if has_dropout or torch_attention.current_flash_attention_impl() is not None:
        return False
    if not flash_3_serves(model.device)[0]:
        return False
    reason = _switch_on(model.device)
    if reason is not None:
        logger.warning(f"FlashAttention 3 is not used: {reason}.")
    return reason is None


def _switch_on(device: torch.device) -> str | None:
    """Switches it on if it computes what torch's own kernels do; returns why not, or None."""
    own = _numbers(device)
    try:
        torch_attention.activate_flash_attention_impl(IMPLEMENTATION)
        pairs = zip(_numbers(device), own, strict=True)
        error = max((((a - b).norm() / b.norm()).item() for a, b in pairs), key=lambda one: (one != one, one))
        reason = None if error <= _TRIAL_ERROR else f"its numbers differ from torch's by {error:.2g}"
    # Whatever the package raises: torch's own kernels serve.
    except Exception as raised:
        reason = error_line(raised)
    if reason is not None:
        switch_off()
    return reason


def _numbers(device: torch.device) -> list[torch.Tensor]:
    """Returns output, log-sum-exp and gradients of a short row, float32."""
    generator = torch.Generator(device).manual_seed(0)
    make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16, generator=generator)
    query, key, value, upstream = (make(1, heads, 238, 64) for heads in (4, 2, 2, 4))
    spec = AttentionSpec(_TRIAL, 0.125)
    row = CudaRowAttention(query, key, value, spec)
    out, lse = row.forward()
    return [tensor.float() for tensor in (out, lse, *row.backward(upstream, out, lse))]


def switch_off() -> None:
    """Puts torch's own kernels back, if FlashAttention 3 is on."""
    if torch_attention.current_flash_attention_impl() == IMPLEMENTATION:
        torch_attention.restore_flash_attention_impl()
