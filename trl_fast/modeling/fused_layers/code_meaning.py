"""Tells what functions compute by their code, whatever their variables are called."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import cast

# Names of the same thing: the number that norms add to the mean of squares.
EPS_NAMES = ("variance_epsilon", "eps")


class _Renamed(ast.NodeTransformer):
    """Calls arguments and variables by the order in which they come, and the number of a norm by one name."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self.names.setdefault(node.arg, f"v{len(self.names)}"))

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        # The value first: it may read what a target of the same name held before.
        value = self.visit(node.value)
        return ast.Assign([self.visit(target) for target in node.targets], value, lineno=0)

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if isinstance(node.ctx, ast.Store):
            self.names.setdefault(node.id, f"v{len(self.names)}")
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        attribute = "eps" if node.attr in EPS_NAMES else node.attr
        return ast.Attribute(self.visit(node.value), attribute, node.ctx)


@functools.cache
def meaning_of_source(source: str) -> str:
    """Returns what a function's source does, whatever its variables are called; empty if it is no function."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        return ""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    renamed = _Renamed()
    arguments = renamed.visit(function.args)
    return ast.dump(arguments) + "".join(ast.dump(renamed.visit(statement)) for statement in body)


@functools.cache
def source_of(function: Callable | None) -> str:
    """Returns the source of a function without its decorators' wrappers; empty if it has none."""
    try:
        return inspect.getsource(inspect.unwrap(cast("Callable", function)))
    except (OSError, TypeError):
        return ""


@functools.cache
def _meaning(function: Callable | None) -> str:
    source = source_of(function)
    try:
        return meaning_of_source(source) if source else ""
    except SyntaxError:
        return ""


def does(function: Callable | None, *known: str) -> bool:
    """Tells whether a function does what one of these sources does."""
    meaning = _meaning(function)
    return bool(meaning) and meaning in [meaning_of_source(source) for source in known]
