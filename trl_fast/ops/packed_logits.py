"""Logits in 16 bits, for those that wait until their gradient is taken: the format, and PyTorch's way into it.

Packed logits u are transformed (bias, scale, temperature), so that a step means the same for every head. They are
whole steps of 2⁻¹⁰ below the largest of their chunk of columns, counted from the first column of their tile. A chunk
has 2048 columns, or those of a tile of the fused kernel:

    tops (R, chunks) float32: the largest logit of each chunk; NaN is none
    words (R, C) int16, read as unsigned: k < 65535 is the logit top - k · 2⁻¹⁰, 65535 is -∞; what lies more than
    65534 steps below is brought up there

Probabilities are thus off by at most 0.05%: less than the rounding of a bfloat16 gradient (0.2%), let alone that of a
bfloat16 logit. The largest logit is exact, and with it the p - 1 of a target that the model is sure of. What is
brought up has a probability below e⁻⁶⁴. NaN becomes 65535: its row's log-sum-exp is NaN, and so is its gradient. So
is +∞, for the same reason. Tops lie apart from the words so that 16-bit gradients can take the words' place, as the
rows of a matrix. Row kernels pack while they score and unpack while they take the gradient.
"""

from __future__ import annotations

import torch

PACKED_DTYPE = torch.int16
CHUNK = 2048
_STEPS_A_NAT = 1024.0
_LOWEST, _MINUS_INF = 65534.0, 65535


def num_chunks(columns: int, chunk: int = CHUNK) -> int:
    """How many chunks a row of so many logits has."""
    return -(-columns // chunk)


def pack(u: torch.Tensor, words: torch.Tensor, tops: torch.Tensor) -> None:
    """Packs float32 logits u (R, C) into words (R, >= C) int16 and tops (R, >= num_chunks(C)) float32."""
    for number, start in enumerate(range(0, u.shape[1], CHUNK)):
        part = u[:, start : start + CHUNK]
        top = part.masked_fill(part.isnan(), float("-inf")).amax(dim=1)
        steps = (top[:, None] - part) * _STEPS_A_NAT
        codes = torch.where(steps < float("inf"), steps.clamp(max=_LOWEST).round(), float(_MINUS_INF))
        tops[:, number] = top
        words[:, start : start + part.shape[1]] = codes.to(torch.int32).to(PACKED_DTYPE)


def unpack(words: torch.Tensor, tops: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Float32 logits (R, C) of words (R, C) int16 and tops (R, >= num_chunks(C, chunk)) float32."""
    codes = words.to(torch.int32) & 0xFFFF
    top = tops.repeat_interleave(chunk, dim=1)[:, : words.shape[1]]
    return torch.where(codes == _MINUS_INF, float("-inf"), top - codes / _STEPS_A_NAT)
