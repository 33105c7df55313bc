"""Transforms the head's raw product into the logits whose softmax is the policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class LogitTransform(NamedTuple):
    """Holds the numbers of `u = cap(scale * (z + bias)) * inv_temperature`, `cap(y) = softcap * tanh(y / softcap)`.

    A softcap of 0 means none. The order (bias, scale, softcap, temperature) is that of the model families that have
    these terms: Cohere and Granite scale, Gemma caps, and sampling divides by the temperature last.
    """

    scale: float = 1.0
    softcap: float = 0.0
    inv_temperature: float = 1.0

    @classmethod
    def of(cls, *, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0) -> LogitTransform:
        """Returns the transform of a user's numbers, checked.

        Raises:
            ValueError: a value is not finite, or temperature or softcap is not positive.
        """
        for name, value in (("temperature", temperature), ("softcap", softcap)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if not math.isfinite(logit_scale):
            raise ValueError(f"logit_scale must be a finite number, got {logit_scale!r}")
        return cls(float(logit_scale), float(softcap or 0.0), 1.0 / float(temperature))

    def apply(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the logits u in float32 (float64 stays float64), and tanh(y / softcap) when there is a cap.

        logits: (R, C) floating point; bias: (C,) or None.
        """
        y = logits if logits.dtype == torch.float64 else logits.float()
        if bias is not None:
            y = y + bias.to(y.dtype)
        if self.scale != 1.0:
            y = y * self.scale
        tanh = None
        if self.softcap:
            tanh = torch.tanh(y / self.softcap)
            y = tanh * self.softcap
        if self.inv_temperature != 1.0:
            y = y * self.inv_temperature
        return y, tanh

    def derivative(self, u: torch.Tensor) -> torch.Tensor:
        """Returns du/dz where the transformed logit is u: any shape, any float dtype."""
        derivative = torch.full_like(u, self.scale * self.inv_temperature)
        if self.softcap:
            derivative *= 1 - (u / (self.inv_temperature * self.softcap)).square()
        return derivative
