"""Lets attention normalise its queries and keys and turn them by their positions in one pass.

What is looked for in an attention's forward are two statements that normalise and one that turns:

    q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
    k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)

Between them nothing but views may be made of `q` and `k`. The norms are taken out, and the last statement becomes
`q, k = norm_and_turn(self.q_norm, self.k_norm, apply_rotary_pos_emb, q, k, cos, sin, of_all_heads=False)`; all other
code is the attention's own. Such are Qwen3's, Gemma 3's and, with one norm of all heads of a token, OLMo 2's and 3's.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .bare_modules import is_bare
from .rewritten_code import Rewrite, RewrittenClass, rewritten_class
from .rotary_functions import drawn_angles
from .try_outs import Draw, in_class, norm_width, stand_in, why_functions_differ

_VIEWS = ("view", "reshape")


class TurningAttention(NamedTuple):
    """Holds an attention's class that normalises and turns at once, and its norms."""

    cls: type[nn.Module]
    query_norm: nn.Module
    key_norm: nn.Module


def turning_attention(attention: nn.Module) -> TurningAttention | None:
    """Returns what normalises and turns at once in the place of an attention; None if its code is not as above."""
    found = None if "forward" in vars(attention) else _attention_class(cast("Any", type(attention)))
    if found is None:
        return None
    query_norm, key_norm = (getattr(attention, name, None) for name in found.names[0])
    if not isinstance(query_norm, nn.Module) or not isinstance(key_norm, nn.Module):
        return None
    return TurningAttention(found.cls, query_norm, key_norm)


def why_attention_differs(
    attention: Any, norm: Any, fused: type[nn.Module], turn: Any, device: torch.device, dtype: torch.dtype
) -> str:
    """Tries a norm of queries and a function that turns, at once; returns why that does not serve, empty if it does.

    attention: the one that has the norm; fused: the norm's fused class; turn: a fused function that turns two tensors.
    """
    length = norm_width(norm)
    width = min(getattr(attention, "head_dim", length), length)
    key = type(norm), fused, length, width, turn.fused_from, device, dtype
    if key not in _found:
        draw = Draw(device, dtype)
        plain = stand_in(norm, length, draw)
        ours = in_class(plain, fused)
        inputs = [draw(2, length // width, 5, width) for _ in range(2)]
        angles = drawn_angles(turn.known, draw, inputs[0], width)
        plainly, at_once = (
            lambda q, k, each=each, way=way: norm_and_turn(each, each, way, q, k, *angles, of_all_heads=length > width)
            for each, way in ((plain, turn.fused_from), (ours, turn))
        )
        _found[key] = why_functions_differ(plainly, at_once, inputs, list(plain.parameters()))
    return _found[key]


_found: dict[tuple[object, ...], str] = {}


@functools.cache
def _attention_class(cls: type[nn.Module]) -> RewrittenClass | None:
    return rewritten_class(cls, NORMS_AND_TURN)


def norm_and_turn(
    query_norm: Any,
    key_norm: Any,
    turn: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    of_all_heads: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `turn(query_norm(query), key_norm(key), cos, sin)`: in one pass, where norms and function have one.

    A norm that something else is put upon, hooks or another forward, is called as before.

    Args:
        query, key: (B, heads, T, D), before their norms.
        cos, sin: as `turn` takes them.
        of_all_heads: whether there is one norm of all heads of a token, not one a head.
    """
    in_one_pass = getattr(turn, "norm_and_turn", None)
    norms = query_norm, key_norm
    if in_one_pass is not None and all(hasattr(norm, "settings") and is_bare(norm) for norm in norms):
        settings = query_norm.settings(), key_norm.settings()
        turned = in_one_pass(*settings, query, key, cos, sin, of_all_heads=of_all_heads)
        if turned is not None:
            return turned
    normalized = (_normalized(norm, x, of_all_heads) for norm, x in zip(norms, (query, key), strict=True))
    return turn(*normalized, cos, sin)


def _normalized(norm: Any, x: torch.Tensor, of_all_heads: bool) -> torch.Tensor:
    """Returns the norm of (B, heads, T, D), in its shape."""
    if not of_all_heads:
        return norm(x)
    by_tokens = x.transpose(1, 2)
    return norm(by_tokens.flatten(2)).view(by_tokens.shape).transpose(1, 2)


class _Norm(NamedTuple):
    """Holds a call of a norm, its name, and whether heads are made of what it gives."""

    call: ast.Call
    name: str
    of_all_heads: bool


def norms_before_turn(function: ast.FunctionDef) -> tuple[str, ...]:
    """Rewrites the statements of a function that normalise queries and keys and turn them.

    Returns the norms' names, none if there are no such statements.
    """
    for at, statement in enumerate(function.body):
        match statement:
            case ast.Assign(
                [ast.Tuple([ast.Name(query), ast.Name(key)])],
                ast.Call(ast.Name() as turn, [ast.Name(given), ast.Name(given_key), cos, sin], []),
            ) if (query, key) == (given, given_key):
                norms = [_norm_of(query, function.body[:at]), _norm_of(key, function.body[:at])]
                found = [norm for norm in norms if norm is not None]
                if len(found) < 2 or found[0].of_all_heads != found[1].of_all_heads:
                    return ()
                for norm in found:
                    _take_out(norm.call, function)
                modules = ", ".join(f"self.{norm.name}" for norm in found)
                flag = f"of_all_heads={found[0].of_all_heads}"
                source = f"{query}, {key} = _norm_and_turn({modules}, {turn.id}, {query}, {key}, None, None, {flag})"
                made = ast.parse(source).body[0]
                cast("Any", made).value.args[-2:] = [cos, sin]
                function.body[at] = ast.copy_location(made, statement)
                return tuple(norm.name for norm in found)
    return ()


def _norm_of(name: str, statements: list[ast.stmt]) -> _Norm | None:
    """Returns the norm that a variable was given, if nothing but views were made of it since."""
    has_view = False
    for statement in reversed(statements):
        if not any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement)):
            continue
        match statement:
            case ast.Assign([ast.Name(target)], value) if target == name:
                pass
            case _:
                return None
        while True:
            match value:
                case ast.Call(ast.Attribute(viewed, "transpose"), [ast.Constant(1), ast.Constant(2)], []):
                    value = viewed
                case ast.Call(ast.Attribute(viewed, method), _, []) if method in _VIEWS:
                    value, has_view = viewed, True
                case _:
                    break
        match value:
            case ast.Call(ast.Attribute(ast.Name("self"), norm), [given], []) as call:
                return _Norm(call, norm, has_view) if not has_view or _is_projection(given) else None
            case ast.Name(variable) if variable == name:
                continue
            case _:
                return None
    return None


def _is_projection(node: ast.expr) -> bool:
    """Tells whether an expression is what a module gives, a row a token: `self.q_proj(hidden_states)`."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("self"), _), [ast.Name()], []):
            return True
    return False


def _take_out(call: ast.Call, function: ast.FunctionDef) -> None:
    """Puts what a call is given in its place."""

    class TakeOut(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            return node.args[0] if node is call else self.generic_visit(node)

    TakeOut().visit(function)


NORMS_AND_TURN = Rewrite(norms_before_turn, norm_and_turn)
