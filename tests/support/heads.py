"""Problems for the head ops, with the float64 answer and what plain PyTorch gives in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BACKENDS = ("torch", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class HeadProblem:
    """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,), and how logits are transformed."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def transform(self) -> dict:
        return {"temperature": self.temperature, "softcap": self.softcap, "logit_scale": self.logit_scale}

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def logits(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Transformed logits (N, V): the product in `dtype` (None: the tensors' own), the rest in float32 at least."""
        hidden, weight = (
            (self.hidden, self.weight) if dtype is None else (self.hidden.to(dtype), self.weight.to(dtype))
        )
        z = F.linear(hidden, weight)
        z = z if z.dtype == torch.float64 else z.float()
        if self.bias is not None:
            z = z + self.bias.to(z.dtype)
        z = z * self.logit_scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature


def make_problem(
    n: int,
    v: int,
    h: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    offset: float = 0.0,
    seed: int = 0,
    spread: float = 1.0,
    **transform: float,
) -> HeadProblem:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) * spread).to(dtype).requires_grad_()
    b = None
    if bias or offset:
        b = (torch.randn(v, generator=generator) + offset).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=generator)
    return HeadProblem(hidden, weight, b, targets, **transform)


def scores_from_logits(u: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every output of the head from whole transformed logits (N, V), by plain PyTorch."""
    logp = u.log_softmax(-1)
    p = logp.exp()
    return {
        "logprobs": logp.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -torch.where(p > 0, p * logp, 0.0).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp, -1),
        "mean_logits": u.mean(-1),
        "is_top1": u.argmax(-1) == targets if u.shape[0] else targets.bool(),
    }


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    difference = (got.double() - exact.double()).norm().item()
    return float("inf") if difference != difference else difference / max(exact.double().norm().item(), 1e-12)


def assert_as_good(got: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor, what: str, floor: float) -> None:
    """The project's rule: our error is at most twice the same-dtype baseline's, or below `floor`."""
    ours, theirs = error(got, exact), error(baseline, exact)
    assert ours <= max(2 * theirs, floor), f"{what}: relative error {ours:.3g}, PyTorch in the same dtype {theirs:.3g}"


# A few units in the last place: below it, which of two rounding orders is nearer to the truth is luck.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
