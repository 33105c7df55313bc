"""Exchanges the functions that turn queries and keys by ones that do it in one pass.

They belong to a Python module of transformers, so that all models of its family share them. What a call brings that
the kernels do not take goes to the function that was there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from trl_fast.ops.backends import KERNEL_DTYPES
from trl_fast.ops.layers import rotary
from trl_fast.parallel.engines import original_class

from .known_code import KnownRotary, known_rotaries
from .try_outs import Draw, why_functions_differ


class RotaryFunction(NamedTuple):
    """Names a function of a Python module, what it is known to do, and one that does the same in one pass."""

    module: str
    name: str
    plain: Callable
    fused: Callable

    def exchange(self) -> None:
        """Puts the fused function in the place of the plain one."""
        setattr(sys.modules[self.module], self.name, self.fused)


def restore_function(module: str, name: str, function: Callable) -> None:
    """Gives a Python module its own function back."""
    setattr(sys.modules[module], name, function)


def rotary_functions(model: PreTrainedModel) -> Iterator[RotaryFunction]:
    """Yields what turns the queries and keys of a model and can be exchanged."""
    names = {original_class(module).__module__ for module in model.modules()}
    for modeling in (sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")):
        yield from _functions_of(modeling)


def _functions_of(modeling: ModuleType) -> Iterator[RotaryFunction]:
    for known in known_rotaries(modeling):
        plain = getattr(modeling, known.function)
        if not hasattr(plain, "fused_from"):
            yield RotaryFunction(modeling.__name__, known.function, plain, _fused(plain, known))


def why_rotary_differs(function: RotaryFunction, device: torch.device, dtype: torch.dtype) -> str:
    """Tries a fused function; returns why it does not serve, empty if all numbers agree."""
    draw = Draw(device, dtype)
    query, key, cos, sin = draw(2, 3, 5, 8), draw(2, 1, 5, 8), draw(2, 5, 8), draw(2, 5, 8)
    plain, ours = (lambda q, k, turn=turn: turn(q, k, cos, sin) for turn in (function.plain, function.fused))
    return why_functions_differ(plain, ours, [query, key])


def _fused(plain: Callable, known: KnownRotary) -> Callable:
    """Returns the function in one pass, which calls the plain one with what the kernels do not take."""

    @functools.wraps(plain)
    def turn(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim != 1 or not _can_turn(q, k, cos, sin):
            return plain(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin)

    cast("Any", turn).fused_from = plain
    return turn


def _can_turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    one_dtype = q.dtype == k.dtype == cos.dtype == sin.dtype and q.dtype in KERNEL_DTYPES
    shapes = (q.shape[0], *q.shape[2:]), (k.shape[0], *k.shape[2:])
    fits = shapes[0] == shapes[1] and cos.shape[1:] == q.shape[2:] and cos.shape[0] in (1, q.shape[0])
    return one_dtype and fits and q.shape[-1] % 2 == 0 and not (cos.requires_grad or sin.requires_grad)
