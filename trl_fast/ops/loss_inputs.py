"""What the loss ops refuse, by name, before they compute anything."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .validation import checks_requested

LOGPROB_DTYPES = (torch.float32, torch.float64)


def check_logprobs(logprobs: torch.Tensor) -> None:
    """logprobs (N,) float32, or float64 for the reference.

    Raises:
        ValueError: saying what it was and what was expected.
    """
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs: expected shape (N,), got shape {tuple(logprobs.shape)}")
    if logprobs.dtype not in LOGPROB_DTYPES:
        raise ValueError(f"logprobs: expected torch.float32, got {logprobs.dtype}; cast it with .float()")


def check_vector(
    name: str, vector: torch.Tensor, size: int, logprobs: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """`vector` has shape (size,), the device of logprobs and `dtype` (None: that of logprobs).

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    dtype = dtype or logprobs.dtype
    if tuple(vector.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got shape {tuple(vector.shape)}")
    if vector.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {vector.dtype}")
    if vector.device != logprobs.device:
        raise ValueError(f"{name}: expected device {logprobs.device} as logprobs has, got {vector.device}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """`value` is one of `choices`.

    Raises:
        ValueError: naming the field, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}: unknown name {value!r}; expected one of {', '.join(choices)}")


def values_are_checked(vector: torch.Tensor) -> bool:
    """Whether to look into `vector`: on a GPU only when TRL_FAST_CHECK=1, since it makes the host wait."""
    return vector.device.type == "cpu" or checks_requested()
