"""Lets linear layers that read one input, with adapters or not, sum their gradients by it inside their products.

What is looked for in a module's forward are calls of several linear layers with the same variable:

    q = self.q_proj(x).view(shape).transpose(1, 2)
    k = self.k_proj(x).view(shape).transpose(1, 2)
    v = self.v_proj(x).view(shape).transpose(1, 2)

The first of them makes all, `made = project(x, {"q_proj": self.q_proj, ...})`, and each call becomes
`made.pop("q_proj")`; all other code is the module's own. Nothing may be stored in `x` between them, and each has to be
made whatever else is. Calls within branches are left as they are.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .projections import is_joinable, project
from .rewritten_code import Rewrite, RewrittenClass, rewritten_class
from .turned_norms import NORMS_AND_TURN

_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
# Of these not all parts are computed, or not once.
_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def joint_class_for(module: nn.Module, *, turns: bool) -> type[nn.Module] | None:
    """Returns a class for a module whose linear layers read one input; None if its code has no such.

    turns: whether the class also is to normalise queries and keys and turn them at once, as `turned_norms` has it.
    """
    found = _joint_class(cast("Any", type(module)), _children(module, is_joinable), turns)
    return None if found is None else found.cls


def why_not_joint(module: nn.Module) -> str:
    """Returns why layers of a module that read one input are left as they are; empty if there are no such."""
    found = _joint_class(cast("Any", type(module)), _children(module, _is_some_linear), False)
    if found is None:
        return ""
    classes = {type(layer) for layer in map(module.get_submodule, found.names[-1]) if not is_joinable(layer)}
    others = ", ".join(sorted(f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in classes))
    return f"{type(module).__name__}: gradients by what its projections read are summed one by one, of {others}"


def _is_some_linear(module: nn.Module) -> bool:
    """Tells whether a module is a linear layer of whatever kind: with adapters of any sort, or of 4 bits."""
    return isinstance(module, (nn.Linear, BaseTunerLayer))


def _children(module: nn.Module, are: Any) -> frozenset[str]:
    return frozenset(name for name, child in module.named_children() if are(child))


@functools.cache
def _joint_class(cls: type[nn.Module], linears: frozenset[str], turns: bool) -> RewrittenClass | None:
    join = Rewrite(functools.partial(join_projections, linears=linears), project)
    found = rewritten_class(cls, *([NORMS_AND_TURN] if turns else []), join) if len(linears) > 1 else None
    return found if found is not None and found.names[-1] else None


@dataclass
class _Group:
    """Holds calls of linear layers with one variable, by the layers' names, and the statement of the first."""

    at: int
    variable: str
    calls: dict[str, ast.Call] = field(default_factory=dict)


def join_projections(function: ast.FunctionDef, linears: Collection[str]) -> tuple[str, ...]:
    """Rewrites calls of linear layers with one variable; returns the layers' names, none if there are no such calls.

    linears: names of the module's linear layers.
    """
    groups = [group for group in _groups(function.body, linears) if len(group.calls) > 1]
    taken: dict[ast.Call, ast.expr] = {}
    for number, group in enumerate(groups):
        taken |= {call: _expression(f"_made{number}.pop({name!r})") for name, call in group.calls.items()}
    for number, group in reversed([*enumerate(groups)]):
        layers = ", ".join(f"{name!r}: self.{name}" for name in group.calls)
        first = ast.parse(f"_made{number} = _project({group.variable}, {{{layers}}})").body[0]
        function.body.insert(group.at, ast.copy_location(first, function.body[group.at]))
    _Exchange(taken).visit(function)
    return tuple(name for group in groups for name in group.calls)


def _groups(body: list[ast.stmt], linears: Collection[str]) -> Iterator[_Group]:
    """Yields groups of calls between which nothing is stored in their variable, in the order of their first calls."""
    found: list[_Group] = []
    open_groups: dict[str, _Group] = {}
    for at, statement in enumerate(body):
        for name, variable, call in _calls(statement, linears) if _is_simple(statement) else ():
            group = open_groups.get(variable)
            if group is None or name in group.calls:
                group = open_groups[variable] = _Group(at, variable)
                found.append(group)
            group.calls[name] = call
        for node in ast.walk(statement):
            match node:
                case ast.Return():
                    open_groups.clear()
                case ast.Name(variable, ast.Store() | ast.Del()) | ast.Subscript(ast.Name(variable), _, ast.Store()):
                    open_groups.pop(variable, None)
    return iter(found)


def _is_simple(statement: ast.stmt) -> bool:
    """Tells whether all of a statement is computed, and stores what it does when that is done."""
    return isinstance(statement, _SIMPLE) and not any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement))


def _calls(node: ast.AST, linears: Collection[str]) -> Iterator[tuple[str, str, ast.Call]]:
    """Yields calls that are made whatever else is: the layer's name, the variable, and the call."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name(variable)], []) if name in linears:
            yield name, variable, node
            return
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _CONDITIONAL):
            yield from _calls(child, linears)


def _expression(source: str) -> ast.expr:
    return cast("ast.Expr", ast.parse(source).body[0]).value


class _Exchange(ast.NodeTransformer):
    """Puts expressions in the place of calls."""

    def __init__(self, taken: Mapping[ast.Call, ast.expr]) -> None:
        self._taken = taken

    def visit_Call(self, node: ast.Call) -> ast.AST:
        made = self._taken.get(node)
        return self.generic_visit(node) if made is None else ast.copy_location(made, node)
