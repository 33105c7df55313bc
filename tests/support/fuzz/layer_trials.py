"""Tries the ops of layers: each in one pass, held to transformers', PEFT's or PyTorch's code, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from support.fuzz.draw import Draw
from support.fuzz.hold import Held
from support.plain_norms import EPS as NORM_EPS
from support.plain_norms import PLAIN_NORMS, exact_norm
from trl_fast.ops import layers
from trl_fast.ops.layers.rotations import turn_reference

Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
GATES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
SCALING = 1.5
# Of a result's largest number, in its dtype: what always passes. Sums of equal numbers are rounded to one side.
ROUNDINGS = 16


class Trial(NamedTuple):
    """Holds an op, the same as others write it, the same without roundings, what it is about, and what all are given.

    size: a function of about the same magnitude, whose terms, and those of its gradients, do not cancel.
    """

    ours: Function
    plain: Function
    exact: Function
    size: Function
    given: list[torch.Tensor]


def _of_magnitudes(function: Function) -> Function:
    """Returns a sum of products of magnitudes."""
    return lambda *given: function(*(x.abs() for x in given))


def _norm_size(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the size of a norm: the root is as good as constant."""
    rstd = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + NORM_EPS)
    return x.abs() * rstd * (1 + weight.abs())


def _drawn(draw: Draw, name: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Draws a leaf in the case's dtype, in memory of any layout."""
    return draw.laid_out(name, (draw.normal(*shape) * scale).to(draw.said["dtype"])).requires_grad_()


def _rows(draw: Draw) -> tuple[int, ...]:
    """Draws the shape of rows: none, one, or some."""
    return draw.choose("rows", (), (0,), (1,), (3, 7), (2, 3, 4), (130,))


def _norm(draw: Draw, backend: str) -> Trial:
    cast, shape = draw.choose("cast", *PLAIN_NORMS), (*_rows(draw), draw.choose("width", 1, 2, 20, 65, 576))
    scale = draw.choose("scale", 1.0, 0.03, 100.0)
    given = [_drawn(draw, "x", *shape, scale=scale), _drawn(draw, "weight", shape[-1])]
    named = {"eps": NORM_EPS, "cast": cast, "backend": backend}
    norms = PLAIN_NORMS[cast], exact_norm(cast), _norm_size
    residual = draw.choose("residual", "none", "added", "added", "kept")
    if residual == "none":
        return Trial(partial(layers.rms_norm, **named), *norms, given)
    if residual == "kept":
        kept = [lambda x, weight, norm=norm: (norm(x, weight), x.clone()) for norm in norms]
        return Trial(partial(layers.norm_and_residual, **named), *kept, given)
    given.insert(1, _drawn(draw, "residual", *shape, scale=scale))

    def with_sum(norm: Function) -> Function:
        return lambda x, residual, weight: (norm(residual + x, weight), residual + x)

    others = (with_sum(norm) for norm in norms)
    return Trial(partial(layers.residual_rms_norm, **named), *others, given)


def _gate(draw: Draw, backend: str) -> Trial:
    activation, shape = draw.choose("activation", *GATES), (*_rows(draw), draw.choose("width", 1, 16, 33, 1031))
    named = {"activation": activation, "backend": backend}

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return GATES[activation](gate) * up

    def size(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (1 + gate.abs()) * up.abs()

    def of_chunks(function: Function) -> Function:
        return lambda both: function(*both.chunk(2, dim=-1))

    if draw.chance("chunked", 0.5):
        both = _drawn(draw, "gate_up", *shape[:-1], 2 * shape[-1], scale=3.0)
        others = (of_chunks(function) for function in (plain, plain, size))
        return Trial(partial(layers.chunked_gated_activation, **named), *others, [both])
    given = [_drawn(draw, "gate", *shape, scale=3.0), _drawn(draw, "up", *shape)]
    return Trial(partial(layers.gated_activation, **named), plain, plain, size, given)


def _rotation(draw: Draw, backend: str) -> Trial:
    batch, tokens = draw.choose("batch", 0, 1, 2), draw.choose("tokens", 0, 1, 9)
    width, heads = draw.choose("width", 2, 20, 72), draw.choose("heads", (1, 1), (4, 2), (3, 3))
    turned, pairs = draw.choose("turned", 2, width, width), draw.choose("pairs", *layers.PAIRS)
    one, upcast = draw.chance("one_angle_a_pair", 0.5), draw.chance("upcast", 0.3)
    angles = 3 * draw.normal(draw.choose("rows_of_angles", 1, batch), tokens, turned // 2 if one else turned)
    cos, sin = (draw.laid_out("angles", x.to(draw.said["dtype"])) for x in (angles.cos(), angles.sin()))
    names = ("query", "key")
    given = [_drawn(draw, name, batch, n, tokens, width) for name, n in zip(names, heads, strict=True)]
    named = {"cos": cos, "sin": sin, "pairs": pairs, "one_angle_a_pair": one, "upcast": upcast, "backend": backend}

    def plain(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(turn_reference(x, cos, sin, pairs, one, upcast, False) for x in heads)

    def exact(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(turn_reference(x, cos.double(), sin.double(), pairs, one, False, False) for x in heads)

    def size(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(2 * x.abs() for x in heads)

    if not draw.chance("norms", 0.5):
        return Trial(partial(layers.rotary, **named), plain, exact, size, given)
    cast, is_joint = draw.choose("cast", *PLAIN_NORMS), draw.chance("joint", 0.3)
    given += [
        _drawn(draw, f"{name}_weight", n * width if is_joint else width) for name, n in zip(names, heads, strict=True)
    ]

    def with_norms(norm: Function, turn: Function) -> Function:
        def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            by_tokens = x.transpose(1, 2)
            rows = by_tokens.flatten(2) if is_joint else by_tokens
            return norm(rows, weight).view(by_tokens.shape).transpose(1, 2)

        return lambda q, k, q_weight, k_weight: turn(normed(q, q_weight), normed(k, k_weight))

    ours = partial(layers.qk_norm_rotary, eps=NORM_EPS, cast=cast, **named)
    others = ((PLAIN_NORMS[cast], plain), (exact_norm(cast), exact), (_norm_size, size))
    return Trial(ours, *(with_norms(*both) for both in others), given)


def _embedding(draw: Draw, backend: str) -> Trial:
    words, width, shape = draw.choose("words", 1, 11, 300), draw.choose("width", 1, 20, 65), _rows(draw)
    ids = draw.indices(words, *shape)
    ids = draw.laid_out("ids", ids) if shape else ids
    ids = ids.to(draw.choose("ids", torch.int64, torch.int32))
    padding = draw.choose("padding", None, 0, -1)
    look_up = partial(layers.embedding, ids, padding_idx=padding, backend=backend)
    plain = partial(F.embedding, ids, padding_idx=padding)
    weight = _drawn(draw, "weight", words, width)
    if not draw.chance("tied", 0.5):
        return Trial(look_up, plain, plain, _of_magnitudes(plain), [weight])

    def ours(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, head = layers.tied_embedding(ids, weight, padding, backend=backend)
        return rows, rows @ head.t()

    def plain_tied(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return plain(weight), plain(weight) @ weight.t()

    return Trial(ours, plain_tied, plain_tied, _of_magnitudes(plain_tied), [weight])


def _lora(draw: Draw, backend: str) -> Trial:
    rows, inputs, outputs = _rows(draw), draw.choose("inputs", 1, 20, 96), draw.choose("outputs", 1, 12, 80)
    rank, scale = draw.choose("rank", 1, 4, 17), inputs**-0.5
    given = [_drawn(draw, "x", *rows, inputs), _drawn(draw, "weight", outputs, inputs, scale=scale)]
    given += [_drawn(draw, "a", rank, inputs, scale=scale), _drawn(draw, "b", outputs, rank)]
    if draw.chance("bias", 0.5):
        given.append(_drawn(draw, "bias", outputs))

    def ours(
        x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layers.lora_linear(x, weight, bias, a, b, SCALING)

    def plain(
        x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * SCALING

    return Trial(ours, plain, plain, _of_magnitudes(plain), given)


def _joint(draw: Draw, backend: str) -> Trial:
    rows, inputs = _rows(draw), draw.choose("inputs", 1, 20, 96)
    outputs = draw.choose("outputs", (1, 12), (80, 16, 16))
    given = [_drawn(draw, "x", *rows, inputs)]
    given += [_drawn(draw, f"weight {i}", width, inputs, scale=inputs**-0.5) for i, width in enumerate(outputs)]
    ranks = [draw.choose(f"rank {i}", 0, 0, 1, 4) for i in range(len(outputs))]
    for i, rank in enumerate(ranks):
        if rank:
            given += [
                _drawn(draw, f"a {i}", rank, inputs, scale=inputs**-0.5),
                _drawn(draw, f"b {i}", outputs[i], rank),
            ]
    if draw.chance("bias", 0.5):
        given.append(_drawn(draw, "bias", outputs[0]))

    def split(tensors: tuple[torch.Tensor, ...]) -> tuple[Any, Any, Any]:
        """Returns weights, biases and adapters, each a list with a place for each layer."""
        rest = iter(tensors[len(outputs) :])
        adapters = [layers.Adapter(next(rest), next(rest), SCALING) if rank else None for rank in ranks]
        return tensors[: len(outputs)], [next(rest, None), *(None for _ in outputs[1:])], adapters

    def ours(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return layers.joint_linear(x, *split(tensors))

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: Any) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return y if adapter is None else y + F.linear(F.linear(x, adapter.lora_a), adapter.lora_b) * SCALING

    def plain(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x, *parts) for parts in zip(*split(tensors), strict=True))

    return Trial(ours, plain, plain, _of_magnitudes(plain), given)


TRIALS = {
    "norm": _norm,
    "gate": _gate,
    "rotation": _rotation,
    "embedding": _embedding,
    "lora": _lora,
    "joint": _joint,
}


def _with_gradients(
    function: Function, given: list[torch.Tensor], upstream: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Returns the results of a function and, given their gradients, those of what it is given."""
    out = function(*given)
    outs = list(out) if isinstance(out, tuple) else [out]
    if upstream is None:
        return outs
    grads = [grad.to(x.dtype) for grad, x in zip(upstream, outs, strict=True)]
    return [*outs, *torch.autograd.grad(outs, given, grads)]


def try_layer(draw: Draw, held: Held) -> None:
    """Tries an op of a layer and its gradients, each relative to its largest number."""
    draw.choose("dtype", torch.float32, torch.float32, torch.bfloat16, torch.float16)
    backend = draw.choose("backend", "cpp", "cpp", "torch")
    trial = TRIALS[draw.choose("layer", *TRIALS)](draw, backend)
    upcast = [leaf.detach().double().requires_grad_() for leaf in trial.given]
    outs = _with_gradients(trial.exact, upcast)
    upstream = [draw.normal(*out.shape).to(draw.said["dtype"]) for out in outs]
    upstream = [draw.laid_out("upstream", grad) if grad.dim() else grad for grad in upstream]
    exact = _with_gradients(trial.exact, upcast, upstream)
    largest = [grad.abs().amax().expand(grad.shape) if grad.numel() else grad for grad in upstream]
    sizes = _with_gradients(trial.size, upcast, largest)
    found = _with_gradients(trial.ours, trial.given, upstream), _with_gradients(trial.plain, trial.given, upstream)
    names = [f"result {i}" for i in range(len(outs))] + [f"gradient {i}" for i in range(len(upcast))]
    for name, got, plain, true, size in zip(names, *found, exact, sizes, strict=True):
        unit, info = float(size.detach().abs().max()) if size.numel() else 0.0, torch.finfo(got.dtype)
        held.close(name, got, plain, true, unit, ROUNDINGS * info.eps, info.tiny)
