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
import textwrap
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .code_meaning import source_of
from .fused_classes import is_bare, make_class

# What transformers 5.20 wraps the forward of layers in that can be checkpointed.
_CHECKPOINTING = "forward_with_checkpointing"


def layer_class_for(layer: nn.Module, norms: Collection[nn.Module]) -> type[nn.Module] | None:
    """Returns a class for a decoder layer that adds and normalises at once; None if no norm of `norms` gains by it."""
    found = _layer_class(cast("Any", type(layer)))
    return (
        found.cls if found is not None and any(getattr(layer, name, None) in norms for name in found.norms) else None
    )


class _LayerClass(NamedTuple):
    """Holds a class that is made, and the names of the modules that it adds and calls at once."""

    cls: type[nn.Module]
    norms: tuple[str, ...]


@functools.cache
def _layer_class(cls: type[nn.Module]) -> _LayerClass | None:
    forward, norms = _rewritten(cls.forward)
    return None if forward is None else _LayerClass(make_class(cls, forward=forward), norms)


def add_and_normalize(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns norm(residual + x) and residual + x, (..., H) both: in one pass, where the norm has one.

    A norm that something else is put upon, hooks or another forward, is called as before.
    """
    in_one_pass = getattr(norm, "add_and_normalize", None)
    if in_one_pass is None or not is_bare(norm):
        total = residual + x
        return norm(total), total
    return in_one_pass(x, residual)


def _rewritten(forward: Callable) -> tuple[Callable | None, tuple[str, ...]]:
    """Returns a layer's forward with sums and norms at once, and the norms' names.

    None if there are none, or its code is not to be had.
    """
    if forward.__code__.co_name == _CHECKPOINTING:
        # The class that is made is wrapped again.
        forward = cast("Any", forward).__wrapped__
    code = forward.__code__
    if code.co_freevars or hasattr(forward, "__wrapped__"):
        return None, ()
    source = source_of(forward)
    function = ast.parse(textwrap.dedent(source)).body[0] if source else None
    norms = norms_after_sums(function) if isinstance(function, ast.FunctionDef) else ()
    if not norms or not isinstance(function, ast.FunctionDef):
        return None, ()
    function.decorator_list, function.returns = [], None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # Within a function that has ours, so that the names of the layer's own module stay as they are.
    maker = ast.parse("def make(_add_and_normalize):\n    return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [function, ast.Return(ast.Name(function.name, ast.Load()))]
    tree = ast.increment_lineno(ast.fix_missing_locations(ast.Module([maker], [])), code.co_firstlineno - 1)
    made: dict[str, Any] = {}
    exec(compile(tree, code.co_filename, "exec"), cast("Any", forward).__globals__, made)
    return functools.wraps(forward)(made["make"](add_and_normalize)), norms


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
