"""Gives autograd the gradients of an op's arguments by name; autograd itself wants one for each argument, in order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Protocol

import torch


class AutogradContext(Protocol):
    """Names what autograd's context offers; an op whose context holds more extends it by that.

    saved_tensors: as they were given to save_for_backward; what was None there is None.
    """

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """Tells which arguments need a gradient, in order."""

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns the saved tensors, each of its own shape."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Saves tensors of any shape for the backward pass."""

    def set_materialize_grads(self, value: bool) -> None:
        """Chooses whether a gradient that is missing comes as zeros or as None."""

    def mark_non_differentiable(self, *args: torch.Tensor) -> None:
        """Marks results of any shape as such that have no gradient."""


@functools.cache
def _positions(signature_of: str | Callable) -> dict[str, int]:
    """Returns the position of each argument; of an op's by its full name, of a `Function.forward`'s after `ctx`."""
    if isinstance(signature_of, str):
        namespace, name = signature_of.split("::")
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        names = [argument.name for argument in schema.arguments]
    else:
        names = list(inspect.signature(signature_of).parameters)[1:]
    return {name: position for position, name in enumerate(names)}


def gradients_of(signature_of: str | Callable, **gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Returns a backward function's result: the named gradients in the order of the arguments, None for the others.

    signature_of: the full name of a torch.library op ("trl_fast::pair_loss"), or a `torch.autograd.Function`'s
    `forward`.

    Raises:
        KeyError: there is no argument of such a name.
    """
    positions = _positions(signature_of)
    ordered: list[torch.Tensor | None] = [None] * len(positions)
    for name, gradient in gradients.items():
        ordered[positions[name]] = gradient
    return tuple(ordered)


def first_derivative(of: str) -> Callable[[Callable], Callable]:
    """Marks a backward function of `of` as one that has no derivative itself: second derivatives raise by name.

    `once_differentiable` would not do where forward has computed the gradient: autograd then takes it for a constant.
    """

    def mark(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx: AutogradContext, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            # Autograd records a backward pass only to differentiate it.
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{of} has no second derivative: create_graph=True and torch.func cannot be used through it; "
                    "compute that part with plain PyTorch"
                )
            return backward(ctx, *upstream)

        return checked

    return mark


def needs_gradients(ctx: AutogradContext, signature_of: str | Callable, *names: str) -> list[bool]:
    """Returns which of the named arguments need a gradient; `signature_of` as in `gradients_of`."""
    positions = _positions(signature_of)
    return [ctx.needs_input_grad[positions[name]] for name in names]
