"""Lets decoder layers add a residual and normalise the sum in one pass.

What is looked for is three statements of a layer's forward, whatever else it does:

    x = residual + y
    residual = x
    x = self.norm(x)

They become one, `x, residual = add_and_normalize(self.norm, y, residual)`; all other code is the layer's own. Such are
Llama's layers after attention, Gemma's before the MLP, and those of most families.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from .fused_classes import is_bare
from .rewritten_code import RewrittenClass, rewritten_class


def layer_class_for(layer: nn.Module, norms: Collection[nn.Module]) -> type[nn.Module] | None:
    """Returns a class for a decoder layer that adds and normalises at once; None if no norm of `norms` gains by it."""
    found = _layer_class(cast("Any", type(layer)))
    if found is None or not any(getattr(layer, name, None) in norms for name in found.names):
        return None
    return found.cls


@functools.cache
def _layer_class(cls: type[nn.Module]) -> RewrittenClass | None:
    return rewritten_class(cls, norms_after_sums, add_and_normalize)


def add_and_normalize(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns norm(residual + x) and residual + x, (..., H) both: in one pass, where the norm has one.

    A norm that something else is put upon, hooks or another forward, is called as before.
    """
    in_one_pass = getattr(norm, "add_and_normalize", None)
    if in_one_pass is None or not is_bare(norm):
        total = residual + x
        return norm(total), total
    return in_one_pass(x, residual)


def norms_after_sums(function: ast.FunctionDef) -> tuple[str, ...]:
    """Rewrites the statements of a function that add and normalise; returns the names of the norms."""
    body = function.body
    threes = list(enumerate(zip(body, body[1:], body[2:], strict=False)))
    found = {at: sum_and_norm for at, three in threes if (sum_and_norm := _sum_and_norm(*three)) is not None}
    for at, (_, statement) in sorted(found.items(), reverse=True):
        body[at : at + 3] = [statement]
    return tuple(name for name, _ in found.values())


def _sum_and_norm(add: ast.stmt, keep: ast.stmt, normalize: ast.stmt) -> tuple[str, ast.stmt] | None:
    """Returns a norm's name and the statement that does what three do, if they add, keep the sum and normalise it."""
    match add, keep, normalize:
        case (
            ast.Assign([ast.Name(x)], ast.BinOp(ast.Name(residual), ast.Add(), y)),
            ast.Assign([ast.Name(kept)], ast.Name(total)),
            ast.Assign([ast.Name(normed)], ast.Call(ast.Attribute(ast.Name("self"), norm), [ast.Name(given)], [])),
        ) if x == total == normed == given and residual == kept != x:
            statement = ast.parse(f"{x}, {residual} = _add_and_normalize(self.{norm}, None, {residual})").body[0]
            cast("Any", statement).value.args[1] = y
            return norm, ast.copy_location(statement, add)
    return None
