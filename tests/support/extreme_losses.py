"""Holds losses and their gradients to float64 over log-ratios from 1e-6 to 1e3, number by number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trl_fast.ops import pair_loss, policy_loss

GRID = torch.tensor([1e-6, 1e-4, 1e-2, 0.3, 0.6, 1.0, 3.0, 7.0, 12.0, 15.5, 17.5, 20.0, 30.0, 60.0, 200.0, 1e3])
SIGNED = torch.cat((-GRID.flip(0), torch.zeros(1), GRID))
ULP = 2.0**-23
# Below it float32 has no normal numbers, and kernels may have 0.
TINY = 1e-34


def assert_exact(run: Callable, ours: tuple, inputs: tuple[torch.Tensor, ...], name: str, floor: float = TINY) -> None:
    """Holds values and gradients `ours` to `run` in float64, within twice what a rounding of the inputs moves it.

    run: from float64 inputs to a tuple of values and gradients, each (R,); floor: how far off every number may be.
    """
    exact = run(*(x.double() for x in inputs))
    moved = [torch.zeros_like(one) for one in exact]
    for number in range(len(inputs)):
        for side in (-ULP, ULP):
            given = [x.double() * (1 + side * (k == number)) for k, x in enumerate(inputs)]
            for room, there, here in zip(moved, run(*given), exact, strict=True):
                room.copy_(torch.maximum(room, (there - here).abs().nan_to_num(nan=0.0)))
    for number, (got, true, room) in enumerate(zip(ours, exact, moved, strict=True)):
        true = torch.where(true.abs() > 3e38, true.sign() * float("inf"), true)
        away = torch.where(got.double() == true, 0.0, (got.double() - true).abs())
        bad = ~(away <= 2 * room + 1e-6 * true.abs().nan_to_num(posinf=0.0) + floor)
        where = [x[bad][:4].tolist() for x in (*inputs, got, true)]
        assert not bad.any(), f"{name}, result {number}: inputs {where[:-2]}: got {where[-2]}, float64 {where[-1]}"


def pair_inputs(loss_type: str, step: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log-ratios of chosen and rejected completions (P,), every `step`th of all combinations of the grid.

    Where two terms of a formula meet, what is left of them is as exact as they are: the minimum of exo_pair is not
    tried.
    """
    chosen, rejected = (x.flatten() for x in torch.meshgrid(SIGNED, SIGNED, indexing="ij"))
    apart = torch.ones_like(chosen, dtype=torch.bool)
    if loss_type == "exo_pair":
        apart = (chosen - rejected - math.log(3) / PAIR_NUMBERS["beta"]).abs() > 2
    return chosen[apart][::step], rejected[apart][::step]


# The gradient of apo_down by the chosen log-ratio is the difference of two derivatives of up to 1/8.
PAIR_FLOORS = {"apo_down": 3e-8}
PAIR_NUMBERS = {"beta": 0.5, "label_smoothing": 0.25, "discopop_tau": 2.0}


def run_pair(loss_type: str, forward: Callable = pair_loss) -> Callable:
    """Returns the function from log-ratios to losses and gradients by both, computed by `forward`."""

    def run(chosen, rejected):
        logprobs = torch.stack((chosen, rejected), 1).flatten().requires_grad_()
        offsets, ones = torch.arange(len(logprobs) + 1), torch.ones(len(logprobs), dtype=torch.int64)
        losses, _ = forward(logprobs, offsets, torch.zeros_like(logprobs), ones, loss_type=loss_type, **PAIR_NUMBERS)
        (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
        return losses.detach(), gradient[::2], gradient[1::2]

    return run


def policy_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns log-ratios to the old policy and to the reference, and advantages, (N,).

    Beyond 40 nats ratios are capped, which is no property of the formula.
    """
    inside = SIGNED[SIGNED.abs() < 39]
    old, ref = torch.meshgrid(inside, SIGNED[SIGNED < 39], indexing="ij")
    old, ref = old.flatten(), ref.flatten()
    return old, ref, torch.where(torch.arange(len(old)) % 2 == 0, 1.0, -1.5)


def run_policy(loss_type: str, bias_correct_kl: bool, beta: float, forward: Callable = policy_loss) -> Callable:
    """Returns the function from log π/π_old, log π_ref/π and advantages to KL estimates and gradients."""

    def run(old, ref, advantages):
        logprobs, count = torch.zeros_like(old).requires_grad_(), len(old)
        found = forward(
            logprobs,
            -old,
            advantages,
            torch.arange(count),
            torch.ones_like(old),
            ref_logprobs=ref,
            beta=beta,
            loss_type=loss_type,
            bias_correct_kl=bias_correct_kl,
            epsilon_high=5.0 if loss_type == "cispo" else 0.2,
        )
        (gradient,) = torch.autograd.grad(found.loss, logprobs)
        return found.kl, gradient

    return run
