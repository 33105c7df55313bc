"""Draws heads (hidden states, weight, bias, targets and transform) of every nature, with the units of their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from support.fuzz.draw import Draw
from support.heads import HeadProblem
from trl_fast.ops.device import device_facts
from trl_fast.ops.head.plan import row_bytes
from trl_fast.ops.head.row_kernels import ROW_KERNELS
from trl_fast.ops.matmul import gemm_dtype

NATURES = ("plain", "plain", "peaked", "offset", "minus infinity", "confident", "tiny", "zero hidden", "equal words")
# A step of packed logits is 2⁻¹⁰, and they are taken to be rounded to the nearest.
PACKING = 2.0**-11
# Probabilities of float32 end at 1e-38, and what is smaller is 0; in units of which 1e-6 counts, that is:
NOTHING = 1e-29


def exact_scores(u: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns every output of the head from float64 logits (N, V), -inf among them, with gradients that are numbers.

    The log-probability is -log(1 + the sum of the others' e^(u - the target's u)), which does not cancel.
    """
    target = u.gather(1, targets[:, None])
    others = (u - target).scatter(1, targets[:, None], float("-inf")).clamp(min=-1e30).logsumexp(1)
    logprobs = -torch.logaddexp(torch.zeros_like(others), others)
    logp = u - u.logsumexp(1, keepdim=True)
    p = logp.exp()
    return {
        "logprobs": logprobs,
        "entropy": -(p * torch.where(p > 0, logp, 0.0)).sum(1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp, 1),
        "mean_logits": u.mean(1),
        "is_top1": u.argmax(1) == targets if len(u) else targets.bool(),
    }


@dataclass
class HeadCase:
    """Holds a head with its backend, and its answers: `exact` in float64, `plain` by PyTorch in the product's dtype.

    In `plain` only the logits are of that dtype: their softmax is of float64, so that it stays right where the
    target's probability is nearly 1.
    """

    problem: HeadProblem
    backend: str
    product: torch.dtype
    logits: torch.Tensor = field(init=False)
    exact: dict[str, torch.Tensor] = field(init=False)
    plain: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.logits = self.problem.logits(torch.float64)
        self.exact = exact_scores(self.logits, self.problem.targets)
        self.plain = exact_scores(self.problem.logits(self.product).double(), self.problem.targets)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that get a gradient, by name."""
        named = {"hidden": self.problem.hidden, "weight": self.problem.weight, "bias": self.problem.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}

    @property
    def steepness(self) -> float:
        """Returns by how much a logit grows with the product, without the softcap's derivative of at most 1."""
        return abs(self.problem.logit_scale) / self.problem.temperature

    def logit_size(self) -> torch.Tensor:
        """Returns 1 + the largest sum of magnitudes behind a logit of each row, (N, 1): rounding is relative to it."""
        hidden, weight, bias = (
            None if x is None else x.detach().double().abs()
            for x in (self.problem.hidden, self.problem.weight, self.problem.bias)
        )
        size = hidden @ weight.t()
        size = size if bias is None else size + bias.nan_to_num(posinf=0.0)
        return 1 + self.steepness * size.amax(dim=1, keepdim=True)

    def score_units(self) -> dict[str, torch.Tensor]:
        """Returns what errors of the scores (N,) are relative to; of a log-probability: itself, however small."""
        size = self.logit_size()[:, 0]
        exact = {name: value.detach() for name, value in self.exact.items()}
        return {
            "logprobs": (exact["logprobs"].abs() + NOTHING) * size,
            "entropy": exact["entropy"].clamp(min=1) * size,
            "log_sum_sq_probs": (1 + exact["log_sum_sq_probs"].abs()) * size,
            "mean_logits": size,
        }

    def gradient_units(self, by_logprob: torch.Tensor, by_entropy: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what errors of the gradients are relative to: the same sums, of magnitudes.

        by_logprob, by_entropy: (N,), the loss's derivatives. The target's share is as small as 1 - p.
        """
        logp = self.logits.detach().log_softmax(-1)
        p = logp.exp()
        targets = self.problem.targets[:, None]
        # 1 - p of the target: the sum of the others, which does not cancel.
        others = logp.scatter(1, targets, float("-inf")).logsumexp(1, keepdim=True).exp()
        away = p.scatter(1, targets, others)
        logp = torch.where(p > 0, logp, 0.0)
        entropy = -(p * logp).sum(1, keepdim=True)
        sizes = by_logprob.abs()[:, None] * away + by_entropy.abs()[:, None] * p * (logp.abs() + entropy + 1)
        sizes = (sizes * self.logit_size() + NOTHING) * self.steepness
        hidden, weight = (x.detach().double().abs() for x in (self.problem.hidden, self.problem.weight))
        return {"hidden": sizes @ weight, "weight": sizes.t() @ hidden, "bias": sizes.sum(0)}

    def score_floor(self) -> float:
        """Returns the share of a score's unit that always passes."""
        # In float64 it is PyTorch's order of sums that differs.
        terms = self.logits.shape[1] if self.product == torch.float64 else 1
        return 4 * torch.finfo(self.product).eps * math.sqrt(terms)

    def gradient_floors(self) -> dict[str, float]:
        """Returns the share of a gradient's unit that always passes: what sums of so many terms round."""
        num_rows, num_words = self.logits.shape
        eps, dtype = torch.finfo(self.product).eps, self.problem.hidden.dtype
        own = torch.finfo(dtype).eps + (dtype.itemsize == 2) * PACKING
        terms = {"hidden": num_words, "weight": num_rows, "bias": num_rows}
        return {name: own + 8 * eps * math.sqrt(1 + number / 4) for name, number in terms.items()}


def draw_backend(draw: Draw) -> str:
    """Returns a backend; Triton's interpreter is slow, so it comes rarely."""
    return draw.choose("backend", *["cpp"] * 20, *["torch"] * 10, "triton")


def draw_head(draw: Draw, backend: str) -> HeadCase:
    """Draws a head for a backend."""
    most_words = 300 if backend == "triton" else 2200
    dtype = draw.choose("dtype", *[torch.float32] * 3, torch.bfloat16, torch.float16)
    if backend == "torch" and draw.chance("double", 0.1):
        dtype = torch.float64
    nature = draw.choose("nature", *NATURES)
    n = draw.choose("n", 0, 1, 2, 5, 7, 17, 33)
    v = draw.choose("v", *(v for v in (1, 2, 15, 64, 65, 130, 257, 513, 1000, 2049, 2200) if v <= most_words))
    h = draw.choose("h", 0, 1, 3, 8, 24, 33)
    with_bias = draw.chance("bias", 0.4) or nature in ("offset", "minus infinity")
    numbers = {}
    if draw.chance("temperature", 0.3):
        numbers["temperature"] = draw.choose("temperature", 0.3, 0.7, 1.9)
    if draw.chance("softcap", 0.2):
        numbers["softcap"] = draw.choose("softcap", 2.0, 30.0)
    if draw.chance("logit_scale", 0.2):
        numbers["logit_scale"] = draw.choose("logit_scale", 0.125, 3.0, 3.0 if nature == "minus infinity" else -0.5)
    hidden, weight, targets = draw.normal(n, h), draw.normal(v, h), draw.indices(v, n)
    bias = draw.normal(v) if with_bias else None
    hidden, weight = _of_nature(draw, nature, hidden, weight, bias, targets)
    hidden, weight = (draw.laid_out(name, x.to(dtype)) for name, x in (("hidden", hidden), ("weight", weight)))
    bias = None if bias is None else draw.laid_out("bias", bias.to(dtype))
    targets = draw.laid_out("targets", targets)
    problem = HeadProblem(hidden, weight, bias, targets, **numbers)
    for leaf in problem.leaves:
        leaf.requires_grad_(draw.number(0, 1) < 0.7)
    draw.said["trains"] = "".join("ny"[leaf.requires_grad] for leaf in problem.leaves)
    return HeadCase(problem, backend, gemm_dtype(hidden))


def _of_nature(
    draw: Draw,
    nature: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns hidden (N, H) and weight (V, H) of a nature; the bias (V,) is changed in place."""
    if nature == "peaked":
        weight = weight * 8
    elif nature == "offset":
        bias += draw.choose("offset", -1e4, 1e4, 300.0)
    elif nature == "minus infinity":
        out = torch.ones(len(bias), dtype=torch.bool)
        out[targets] = False
        bias[out & (draw.uniform(len(bias)) < 0.5)] = float("-inf")
    elif nature == "confident" and len(hidden):
        own = weight[targets]
        margin = 40 * draw.uniform(len(hidden), 1)
        hidden = own * margin / own.square().sum(1, keepdim=True).clamp(min=1e-3)
    elif nature == "tiny":
        hidden = hidden * draw.choose("size", 1e-3, 1e-7, 1e-40)
    elif nature == "zero hidden":
        hidden = torch.zeros_like(hidden)
    elif nature == "equal words":
        weight = weight[:1].expand(weight.shape)
    return hidden, weight


def draw_workspace(draw: Draw, case: HeadCase) -> int | None:
    """Returns a workspace of some rows of logits, or None for the default."""
    if draw.chance("default_workspace", 0.4):
        return None
    problem = case.problem
    dtype = torch.float32 if device_facts(problem.hidden.device).is_cuda else case.product
    least = row_bytes(len(problem.weight), dtype, ROW_KERNELS[case.backend])
    return least * draw.choose("rows_of_workspace", 1, 2, 3, 6, 40)
