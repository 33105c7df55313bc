"""Exchanges the functions that turn queries and keys by ones that do it in one pass.

They belong to a Python module of transformers, so that all models of its family share them. What a call brings that
the kernels do not take goes to the function that was there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from trl_fast.ops.backends import KERNEL_DTYPES
from trl_fast.ops.layers import qk_norm_rotary, rotary
from trl_fast.parallel.engines import original_class

from .fused_classes import NormSettings
from .known_rotaries import KnownRotary, known_rotaries
from .try_outs import Draw, why_functions_differ


class RotaryFunction(NamedTuple):
    """Names a function of a Python module, what it is known to do, and one that does the same in one pass."""

    module: str
    known: KnownRotary
    plain: Callable
    fused: Callable

    def exchange(self) -> None:
        """Puts the fused function in the place of the plain one."""
        setattr(sys.modules[self.module], self.known.name, self.fused)


def restore_function(module: str, name: str) -> None:
    """Gives a Python module its own function back, if a fused one stands in its place."""
    modeling = sys.modules[module]
    setattr(modeling, name, getattr(getattr(modeling, name), "fused_from", getattr(modeling, name)))


def rotary_functions(model: PreTrainedModel) -> Iterator[RotaryFunction]:
    """Yields what turns the queries and keys of a model and can be exchanged."""
    names = {original_class(module).__module__ for module in model.modules()}
    for name in sorted(name for name in names if name.startswith("transformers.models.")):
        modeling = sys.modules[name]
        for known in known_rotaries(modeling):
            present = getattr(modeling, known.name)
            if hasattr(present, "fused_from"):  # another model of the family has exchanged it
                yield RotaryFunction(name, known, present.fused_from, present)
            else:
                yield RotaryFunction(name, known, present, _fused(present, known))


def turns_after_norms(module: str, found: Iterable[RotaryFunction]) -> list[Callable]:
    """Returns those of the fused functions found in a Python module that normalise, too."""
    return [each.fused for each in found if each.module == module and hasattr(each.fused, "norm_and_turn")]


def why_rotary_differs(function: RotaryFunction, device: torch.device, dtype: torch.dtype) -> str:
    """Tries a fused function; returns why it does not serve, empty if all numbers agree."""
    key = function.module, function.known, device, dtype
    if key not in _found:
        _found[key] = _try(function, Draw(device, dtype))
    return _found[key]


_found: dict[tuple[object, ...], str] = {}


def _try(function: RotaryFunction, draw: Draw) -> str:
    known = function.known
    if known.without_batch:
        inputs = [draw(5, 3, 8), draw(5, 3, 8)]
    else:
        inputs = [draw(2, 3, 5, 8), draw(2, 1, 5, 8)]
    turns, inputs = drawn_angles(known, draw, inputs[0], 8), inputs[: 1 if known.one_tensor else 2]
    plain, ours = (lambda *given, turn=turn: turn(*given, *turns) for turn in (function.plain, function.fused))
    return why_functions_differ(plain, ours, inputs)


def drawn_angles(known: KnownRotary, draw: Draw, like: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Returns random cosines and sines for heads (B, heads, T, width), or (T, heads, width), as a function reads them.

    As transformers makes them: a pair's two numbers have one angle.
    """
    rows = like.shape[:1] if known.without_batch else (like.shape[0], like.shape[2])
    has_all = known.half_of_angles or not known.one_angle_a_pair
    turns = [draw(*rows, width if has_all else width // 2) for _ in range(2)]
    return [_repeated(turn, known) for turn in turns] if has_all else turns


def _repeated(angles: torch.Tensor, known: KnownRotary) -> torch.Tensor:
    half = angles[..., : angles.shape[-1] // 2]
    in_turn = known.pairs == "adjacent" and not known.half_of_angles
    return half.repeat_interleave(2, dim=-1) if in_turn else torch.cat((half, half), dim=-1)


def _fused(plain: Callable, known: KnownRotary) -> Callable:
    """Returns the function in one pass, which calls the plain one with what the kernels do not take.

    Of a function that turns queries and keys, `norm_and_turn` normalises both before; see `turned_norms.py`.
    """

    def turn(
        q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor | None, ...] | None:
        heads_at = options.get("unsqueeze_dim", 1)
        if options.keys() - {"unsqueeze_dim"} or heads_at not in (1, 2):
            return None
        query = _with_heads_first(q, heads_at, known)
        key = None if k is None else _with_heads_first(k, heads_at, known)
        cos, sin = (_angles(angles, known) for angles in (cos, sin))
        if not _can_turn(query, key, cos, sin, known):
            return None
        turned = rotary(query, key, cos, sin, **_way(query, cos, known))
        return tuple(None if x is None else _with_heads_at(x, heads_at, known) for x in turned)

    @functools.wraps(plain)
    def turn_both(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **options: Any
    ) -> Any:
        turned = None if args else turn(q, k, cos, sin, **options)
        return plain(q, k, cos, sin, *args, **options) if turned is None else turned

    @functools.wraps(plain)
    def turn_one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **options: Any) -> Any:
        turned = None if args else turn(x, None, cos, sin, **options)
        return plain(x, cos, sin, *args, **options) if turned is None else turned[0]

    fused: Any = turn_one if known.one_tensor else turn_both
    fused.fused_from, fused.known = plain, known
    if not (known.one_tensor or known.without_batch):
        fused.norm_and_turn = functools.partial(_norm_and_turn, known)
    return fused


def _norm_and_turn(
    known: KnownRotary,
    query_norm: NormSettings,
    key_norm: NormSettings,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    of_all_heads: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns queries and keys (B, heads, T, D) normalised and turned; None where the kernels do not take them."""
    cos, sin = (_angles(angles, known) for angles in (cos, sin))
    if not _can_turn(query, key, cos, sin, known) or query_norm[1:] != key_norm[1:]:
        return None
    weights: list[torch.Tensor] = []
    for norm, x in ((query_norm, query), (key_norm, key)):
        length = x.shape[3] * (x.shape[1] if of_all_heads else 1)
        if norm.weight is None or norm.weight.dtype != query.dtype or norm.weight.shape != (length,):
            return None
        weights.append(norm.weight)
    given = (query, key, weights[0], weights[1], query_norm.eps, cos, sin)
    return qk_norm_rotary(*given, cast=query_norm.cast, **_way(query, cos, known))


def _way(query: torch.Tensor, cos: torch.Tensor, known: KnownRotary) -> dict[str, Any]:
    """Returns how ops.layers turns queries by cosines as a function does."""
    upcast = _upcasts(query, cos, known)
    return {"pairs": known.pairs, "one_angle_a_pair": known.one_angle_a_pair, "upcast": upcast}


def _upcasts(query: torch.Tensor, cos: torch.Tensor, known: KnownRotary) -> bool:
    return cos.dtype != query.dtype if known.upcast is None else known.upcast


def _with_heads_first(x: torch.Tensor, heads_at: int, known: KnownRotary) -> torch.Tensor:
    """Returns queries or keys as (B, heads, T, D), a view."""
    if known.without_batch:
        return x.transpose(0, 1)[None]
    return x if heads_at == 1 else x.transpose(1, 2)


def _with_heads_at(x: torch.Tensor, heads_at: int, known: KnownRotary) -> torch.Tensor:
    """Returns (B, heads, T, D) as the function was given them."""
    if known.without_batch:
        return x[0].transpose(0, 1)
    return x if heads_at == 1 else x.transpose(1, 2)


def _angles(angles: torch.Tensor, known: KnownRotary) -> torch.Tensor:
    """Returns cosines or sines as the kernels read them, (B or 1, T, R or R / 2)."""
    angles = angles[..., : angles.shape[-1] // 2] if known.half_of_angles else angles
    return angles[None] if known.without_batch else angles


def _can_turn(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, known: KnownRotary
) -> bool:
    """Tells whether the kernels take queries, keys and angles."""
    if q.dim() != 4 or cos.dim() != 3 or q.dtype not in KERNEL_DTYPES or cos.shape != sin.shape:
        return False
    if k is not None and (k.dim() != 4 or (k.dtype, k.shape[0], k.shape[2:]) != (q.dtype, q.shape[0], q.shape[2:])):
        return False
    dtypes = (q.dtype, torch.float32) if _upcasts(q, cos, known) else (q.dtype,)
    width = cos.shape[-1] * (2 if known.one_angle_a_pair else 1)
    fits = cos.shape[1] == q.shape[2] and cos.shape[0] in (1, q.shape[0]) and width % 2 == 0 and width <= q.shape[-1]
    return fits and cos.dtype == sin.dtype and cos.dtype in dtypes and not (cos.requires_grad or sin.requires_grad)
