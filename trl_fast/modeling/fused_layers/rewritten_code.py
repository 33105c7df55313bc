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


class Rewrite(NamedTuple):
    """Holds what rewrites statements of a forward.

    - `change`: changes a function's tree so that it calls the helper, by its name with a `_` before it; returns the
      names of the modules of `self` that are given to it, none if nothing was changed.
    """

    change: Callable[[ast.FunctionDef], tuple[str, ...]]
    helper: Callable


class RewrittenClass(NamedTuple):
    """Holds a class that is made, and by each rewrite the names of the modules that its new statements call."""

    cls: type[nn.Module]
    names: tuple[tuple[str, ...], ...]


def rewritten_class(cls: type[nn.Module], *rewrites: Rewrite) -> RewrittenClass | None:
    """Returns a class whose forward was rewritten; None if there is nothing to rewrite, or its code is not to be had.

    rewrites: each changes what the one before has left.
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
    if not isinstance(function, ast.FunctionDef):
        return None
    names = tuple(rewrite.change(function) for rewrite in rewrites)
    if not any(names):
        return None
    function.decorator_list, function.returns = [], None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # Within a function that has the helpers, so that the names of the class's own module stay as they are.
    helpers = ", ".join(f"_{rewrite.helper.__name__}" for rewrite in rewrites)
    maker = ast.parse(f"def make({helpers}):\n    return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [function, ast.Return(ast.Name(function.name, ast.Load()))]
    tree = ast.increment_lineno(ast.fix_missing_locations(ast.Module([maker], [])), code.co_firstlineno - 1)
    made: dict[str, Any] = {}
    exec(compile(tree, code.co_filename, "exec"), cast("Any", forward).__globals__, made)
    rewritten = made["make"](*(rewrite.helper for rewrite in rewrites))
    return RewrittenClass(make_class(cls, forward=functools.wraps(forward)(rewritten)), names)
