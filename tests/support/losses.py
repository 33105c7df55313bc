"""Makes problems for the loss ops, and runs the Triton loss kernels on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch

from support.triton_interpreter import interpreted, interpreter_repaired

# More tokens than two blocks of any kernel, one token, none, and an odd number.
LENGTHS = (4500, 1, 0, 7, 33, 0, 2048, 19)
LOSS_KERNELS = ("pair_loss_kernel", "pair_loss_backward_kernel", "policy_loss_kernel")


@dataclass
class PairProblem:
    """Arguments of `pair_loss`, float32."""

    logprobs: torch.Tensor
    cu_seqlens: torch.Tensor
    ref_logprobs: torch.Tensor
    lengths: torch.Tensor

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        """The four vectors with floats in `dtype`; the log-probabilities are a fresh leaf."""
        logprobs = self.logprobs.detach().to(dtype, copy=True).requires_grad_()
        return logprobs, self.cu_seqlens, self.ref_logprobs.to(dtype), self.lengths


@dataclass
class PolicyProblem:
    """Arguments of `policy_loss`, float32."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    branch: torch.Tensor
    weights: torch.Tensor
    ref_logprobs: torch.Tensor | None

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
        """Positional and keyword arguments with floats in `dtype`; the log-probabilities are a fresh leaf."""
        old, ref = (None if x is None else x.to(dtype) for x in (self.old_logprobs, self.ref_logprobs))
        logprobs = self.logprobs.detach().to(dtype, copy=True).requires_grad_()
        positional = (logprobs, old, self.advantages.to(dtype), self.branch, self.weights.to(dtype))
        return positional, {"ref_logprobs": ref}


def pair_problem(lengths: Sequence[int] = LENGTHS, seed: int = 0, spread: float = 3.0) -> PairProblem:
    """Sequences of these lengths, whose log-ratios are of the size of `spread`; `lengths` count one token more."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths, dtype=torch.int64)
    logprobs = -torch.rand(int(counts.sum()), generator=generator)
    sums = torch.stack([part.sum() for part in logprobs.split(list(lengths))]) if len(lengths) else torch.zeros(0)
    ref_logprobs = sums + spread * torch.randn(len(lengths), generator=generator)
    return PairProblem(logprobs, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), ref_logprobs, counts + 1)


def policy_problem(
    lengths: Sequence[int] = LENGTHS, seed: int = 0, *, on_policy: bool = False, reference: bool = True
) -> PolicyProblem:
    """Sequences of these lengths, one of which has advantage 0; the log-ratios cross the usual bounds both ways."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths, dtype=torch.int64)
    logprobs = -torch.rand(int(counts.sum()), generator=generator)
    old, ref = (logprobs + size * torch.randn(logprobs.shape, generator=generator) for size in (0.4, 0.7))
    advantages = torch.randn(len(lengths), generator=generator)
    advantages[3:4] = 0
    return PolicyProblem(
        logprobs,
        None if on_policy else old,
        advantages,
        torch.arange(len(lengths)).repeat_interleave(counts),
        1 / (counts.clamp(min=1) * max(len(lengths), 1)),
        ref if reference else None,
    )


@contextlib.contextmanager
def interpreted_losses() -> Iterator[None]:
    """Within, the launchers of trl_fast.kernels.loss_kernels run in the repaired interpreter; fresh memory is NaN."""
    from trl_fast.kernels import loss_kernels

    deterministic = torch.are_deterministic_algorithms_enabled()
    with interpreter_repaired(), contextlib.ExitStack() as patches:
        for name in LOSS_KERNELS:
            patches.enter_context(mock.patch.object(loss_kernels, name, interpreted(getattr(loss_kernels, name))))
        # torch.empty is only poisoned in this mode.
        torch.use_deterministic_algorithms(True)
        patches.callback(torch.use_deterministic_algorithms, deterministic)
        yield
