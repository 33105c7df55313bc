"""Holds what an op gives to float64, number by number, in the units that rounding itself has there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Held:
    """Collects what is wrong with one case.

    faults: a line each; worst: by the name of a result, its error as a share of what is allowed.
    """

    faults: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)

    def close(
        self,
        name: str,
        got: torch.Tensor | None,
        plain: torch.Tensor,
        exact: torch.Tensor,
        unit: torch.Tensor | float,
        floor: float,
        least: float = 0.0,
    ) -> None:
        """Holds |got - exact| / unit to twice what PyTorch in the same dtype has at its worst number, or to `floor`.

        Any shape. plain: PyTorch's; unit: what relative rounding errors of this number are relative to; least: an
        absolute error that always passes, such as the smallest number of the dtype. Infinities must be the same.
        """
        if got is None or got.shape != exact.shape:
            self.faults.append(
                f"{name}: expected shape {tuple(exact.shape)}, got {None if got is None else got.shape}"
            )
            return
        if not exact.numel():
            return
        unit = torch.as_tensor(unit, dtype=torch.float64).expand(exact.shape).clamp(min=1e-300)
        ours, theirs = (_errors(x.detach().double(), exact.detach().double(), least) / unit for x in (got, plain))
        theirs = theirs[theirs.isfinite()]
        allowed = max(2 * float(theirs.max()) if len(theirs) else 0.0, floor)
        worst = int(ours.argmax())
        self.worst[name] = float(ours.max()) / allowed
        if not self.worst[name] <= 1:
            here = [float(x.detach().flatten()[worst]) for x in (got, exact, plain)]
            self.faults.append(
                f"{name}: {self.worst[name]:.3g} times what is allowed ({allowed:.2g} of its unit) at number {worst} "
                f"of {got.numel()}: got {here[0]!r}, exact {here[1]!r}, PyTorch {here[2]!r}"
            )

    def same(self, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Holds two tensors to the same bits; NaN is NaN."""
        if got.shape != expected.shape or not torch.equal(got.nan_to_num(7e30), expected.nan_to_num(7e30)):
            differ = (got != expected).sum() if got.shape == expected.shape else "all"
            self.faults.append(f"{name}: not the same bits, {differ} of {got.numel()} numbers differ")


def _errors(got: torch.Tensor, exact: torch.Tensor, least: float) -> torch.Tensor:
    """Returns absolute errors; infinite where one number is not finite and the other is not the same."""
    same = (got == exact) | (got.isnan() & exact.isnan())
    difference = ((got - exact).abs() - least).clamp(min=0)
    return torch.where(same, 0.0, torch.where(difference.isnan(), float("inf"), difference)).flatten().view(got.shape)
