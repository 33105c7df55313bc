"""Rewrites statements of a forward of transformers; all other code stays the class's own, with its module's names."""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import nn

from .code_meaning import source_of
from .fused_classes import make_class

# What transformers 5.20 wraps the forward of layers in that can be checkpointed.
_CHECKPOINTING = "forward_with_checkpointing"


class RewrittenClass(NamedTuple):
    """Holds a class that is made, and the names of the modules of `self` that its new statements call."""

    cls: type[nn.Module]
    names: tuple[str, ...]


def rewritten_class(
    cls: type[nn.Module], rewrite: Callable[[ast.FunctionDef], tuple[str, ...]], helper: Callable
) -> RewrittenClass | None:
    """Returns a class whose forward was rewritten; None if there is nothing to rewrite, or its code is not to be had.

    rewrite: changes a function's tree so that it calls the helper, by its name with a `_` before it; returns the names
    of the modules that are given to it, none if nothing was changed.
    """
    forward: Any = cls.forward
    if forward.__code__.co_name == _CHECKPOINTING:
        # The class that is made is wrapped again.
        forward = forward.__wrapped__
    code = forward.__code__
    if code.co_freevars or hasattr(forward, "__wrapped__"):
        return None
    source = source_of(forward)
    function = ast.parse(textwrap.dedent(source)).body[0] if source else None
    if not isinstance(function, ast.FunctionDef) or not (names := rewrite(function)):
        return None
    function.decorator_list, function.returns = [], None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # Within a function that has the helper, so that the names of the class's own module stay as they are.
    maker = ast.parse(f"def make(_{helper.__name__}):\n    return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [function, ast.Return(ast.Name(function.name, ast.Load()))]
    tree = ast.increment_lineno(ast.fix_missing_locations(ast.Module([maker], [])), code.co_firstlineno - 1)
    made: dict[str, Any] = {}
    exec(compile(tree, code.co_filename, "exec"), cast("Any", forward).__globals__, made)
    return RewrittenClass(make_class(cls, forward=functools.wraps(forward)(made["make"](helper))), names)
