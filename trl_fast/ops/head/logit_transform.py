"""Transforms the head's raw product into the logits whose softmax is the policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


def _check_float32(name: str, value: float | None, number: float) -> None:
    """Refuses a value whose `number` is no normal one in float32: it would become infinite, or 0 and so mean none."""
    least, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if number and not least <= abs(number) <= largest:
        raise ValueError(f"{name}={value!r}: expected a number with which float32 can compute, 1e-37 to 1e37 in size")


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
            ValueError: a value is not finite, temperature or softcap is not positive, or a number that logits are
                multiplied with has no place in float32.
        """
        for name, value in (("temperature", temperature), ("softcap", softcap)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if not math.isfinite(logit_scale):
            raise ValueError(f"logit_scale must be a finite number, got {logit_scale!r}")
        inv_temperature = 1.0 / float(temperature)
        _check_float32("temperature", temperature, inv_temperature)
        _check_float32("softcap", softcap, softcap or 0.0)
        _check_float32("logit_scale", logit_scale, logit_scale)
        _check_float32("logit_scale / temperature", logit_scale * inv_temperature, logit_scale * inv_temperature)
        return cls(float(logit_scale), float(softcap or 0.0), inv_temperature)

    def apply(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the logits u in float32 (float64 stays float64), and the derivative of the cap, if there is one.

        logits: (R, C) floating point; bias: (C,) or None. The derivative 1 − tanh² is taken as cosh⁻², which does not
        cancel.
        """
        y = logits if logits.dtype == torch.float64 else logits.float()
        if bias is not None:
            y = y + bias.to(y.dtype)
        if self.scale != 1.0:
            y = y * self.scale
        derivative = None
        if self.softcap:
            derivative = torch.cosh(y / self.softcap).pow_(-2)
            y = torch.tanh(y / self.softcap) * self.softcap
        if self.inv_temperature != 1.0:
            y = y * self.inv_temperature
        return y, derivative

    def derivative(self, u: torch.Tensor) -> torch.Tensor:
        """Returns du/dz where the transformed logit is u: any shape, any float dtype."""
        derivative = torch.full_like(u, self.scale * self.inv_temperature)
        if self.softcap:
            derivative *= 1 - (u / (self.inv_temperature * self.softcap)).square()
        return derivative
