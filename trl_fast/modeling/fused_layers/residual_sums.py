"""Lets decoder layers add a residual and normalise the sum in one pass, forward and backward.

What is looked for is three statements of a layer's forward, whatever else it does:

    x = residual + y
    residual = x
    x = self.norm(x)

They become one, `x, residual = add_and_normalize(self.norm, y, residual)`. The last two alone, with which layers
begin, become `x, residual = normalize_and_keep(self.norm, x)`: the norm's backward adds the residual's gradient. All
other code is the layer's own. Such are Llama's layers, Gemma's, and those of most families.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from .bare_modules import is_bare
from .rewritten_code import Rewrite, RewrittenClass, rewritten_class


def layer_class_for(layer: nn.Module, norms: Collection[nn.Module]) -> type[nn.Module] | None:
    """Returns a class for a decoder layer that adds and normalises at once; None if no norm of `norms` gains by it."""
    found = _layer_class(cast("Any", type(layer)))
    names = () if found is None else (*found.names[0], *found.names[1])
    if found is None or not any(getattr(layer, name, None) in norms for name in names):
        return None
    return found.cls


@functools.cache
def _layer_class(cls: type[nn.Module]) -> RewrittenClass | None:
    sums, kept = Rewrite(norms_after_sums, add_and_normalize), Rewrite(norms_of_kept, normalize_and_keep)
    return rewritten_class(cls, sums, kept)


def add_and_normalize(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns norm(residual + x) and residual + x, (..., H) both: in one pass, where the norm has one.

    A norm that something else is put upon, hooks or another forward, is called as before.
    """
    in_one_pass = getattr(norm, "add_and_normalize", None)
    if in_one_pass is None or not is_bare(norm):
        total = residual + x
        return norm(total), total
    return in_one_pass(x, residual)


def normalize_and_keep(norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns norm(x) and x, (..., H) both: with one gradient by x, where the norm has such.

    A norm that something else is put upon is called as before, and a compiler adds the gradients as it can.
    """
    at_once = getattr(norm, "normalize_and_keep", None)
    needs = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if at_once is None or not needs or not is_bare(norm):
        return norm(x), x
    return at_once(x)


def norms_of_kept(function: ast.FunctionDef) -> tuple[str, ...]:
    """Rewrites the statements of a function that keep a residual and normalise it; returns the names of the norms.

    None where something may be written into a residual: it is a view.
    """
    body = function.body
    twos = list(enumerate(zip(body, body[1:], strict=False)))
    found = {at: made for at, two in twos if (made := _kept_norm(*two)) is not None}
    if any(_may_write(node, kept) for _, kept, _ in found.values() for node in ast.walk(function)):
        return ()
    for at, (_, _, statement) in sorted(found.items(), reverse=True):
        body[at : at + 2] = [statement]
    return tuple(name for name, _, _ in found.values())


def _kept_norm(keep: ast.stmt, normalize: ast.stmt) -> tuple[str, str, ast.stmt] | None:
    """Returns the names of a norm and a residual and the statement that does what two do, if they are such."""
    match keep, normalize:
        case (
            ast.Assign([ast.Name(kept)], ast.Name(total)),
            ast.Assign([ast.Name(normed)], ast.Call(ast.Attribute(ast.Name("self"), norm), [ast.Name(given)], [])),
        ) if total == normed == given != kept:
            made = ast.parse(f"{given}, {kept} = _normalize_and_keep(self.{norm}, {given})").body[0]
            return norm, kept, ast.copy_location(made, keep)
    return None


def _may_write(node: ast.AST, name: str) -> bool:
    """Tells whether code writes into the tensor of a variable: `x += y`, `x[0] = y`, `x.add_(y)`."""
    match node:
        case ast.AugAssign(ast.Name(written)) | ast.Subscript(ast.Name(written), _, ast.Store()):
            return written == name
        case ast.Call(ast.Attribute(ast.Name(written), method)):
            return written == name and method.endswith("_")
    return False


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
