"""Makes the inputs of a head that the benchmarks race: hidden states, a weight, targets and upstream gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from trl_fast.ops.matmul import gemm_dtype

from .matmul_floor import Floor


@dataclass
class Problem:
    """Holds hidden (N, H), weight (V, H), targets (N,), and the upstream gradient (N,) of the log-probs."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor

    def for_mode(self, mode: str) -> Problem:
        """Returns the same tensors, with gradients wanted as the mode says."""
        hidden = self.hidden.detach().requires_grad_(mode != "scoring")
        weight = self.weight.detach().requires_grad_(mode == "trained")
        return Problem(hidden, weight, self.targets, self.upstream)

    def part(self, rows: int, vocab: int) -> Problem:
        """Returns the first rows of it, with the first columns of the vocabulary."""
        return Problem(self.hidden[:rows], self.weight[:vocab], self.targets[:rows] % vocab, self.upstream[:rows])

    @functools.cached_property
    def floor(self) -> Floor:
        """Returns the bare products of these tensors, in the dtype in which ours are computed."""
        return Floor(self.hidden, self.weight, gemm_dtype(self.hidden))

    def finish(self, logprobs: torch.Tensor) -> None:
        """Runs backward, and drops the gradients again."""
        if logprobs.requires_grad:
            logprobs.backward(self.upstream)
            self.hidden.grad = self.weight.grad = None


def make_problem(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Makes a problem of random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    return Problem(x.to(device, dtype), w.to(device, dtype), targets.to(device), upstream.to(device))
