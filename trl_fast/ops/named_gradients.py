"""Gives autograd the gradients of an op's arguments by name; autograd itself wants one for each argument, in order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch


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


def needs_gradients(ctx: torch.autograd.function.FunctionCtx, signature_of: str | Callable, *names: str) -> list[bool]:
    """Returns which of the named arguments need a gradient; `signature_of` as in `gradients_of`."""
    positions = _positions(signature_of)
    return [ctx.needs_input_grad[positions[name]] for name in names]
