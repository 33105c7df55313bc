"""Lets a model's norms, gated MLPs and rotary embeddings run in one pass each; see ops/layers.

What they compute is told by their code: the forward of a module's class has to be one of those in this file, whatever
its variables are called. Each one is tried on a few numbers first, results and gradients. A module gets a class of its
own, and the function that turns queries and keys is exchanged in its module of transformers, which all models of the
family share; both are undone by `changes_of(model).undo("fused layers")`. What a call brings that the kernels do not
take, such as numbers of two dtypes, runs as before.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_fast.ops.backends import KERNEL_DTYPES, supports
from trl_fast.ops.layers import ACTIVATIONS, gated_activation, rms_norm, rotary
from trl_fast.parallel.engines import original_class
from trl_fast.parallel.partitions import is_partitioned

from .model_changes import changes_of
from .scoring import evaluating

logger = logging.getLogger(__name__)

FUSED_LAYERS = "fused layers"
_ROTARY = "apply_rotary_pos_emb"
# Names of the same thing: the number that norms add to the mean of squares.
_EPS_NAMES = ("variance_epsilon", "eps")
# How far results may be from the module's own, as a share of the largest: some roundings.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}

_LLAMA_NORM = """
def forward(self, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    return self.weight * x.to(dtype)
"""
_GEMMA_NORM = """
def forward(self, x):
    out = self._norm(x.float())
    out = out * (1.0 + self.weight.float())
    return out.type_as(x)
"""
_GEMMA_NORM_HELPER = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
"""
_GATED_MLPS = (
    """
def forward(self, x):
    out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return out
""",
    """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
""",
)
_APPLY_ROTARY = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_out = (q * cos) + (rotate_half(q) * sin)
    k_out = (k * cos) + (rotate_half(k) * sin)
    return q_out, k_out
"""
_ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""


def fuse_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Lets what a model has of norms, gated MLPs and rotary embeddings run in one pass each.

    device: where the model will train; its weights may be elsewhere still.

    Raises:
        ValueError: nothing of the model can be fused; the message has the reasons.
    """
    changes = changes_of(model)
    if FUSED_LAYERS in changes:
        return
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    serving = [supports("rms_norm", "cpp", device, dtype) for dtype in KERNEL_DTYPES if dtype in dtypes]
    if not any(support.ok for support in serving):
        reason = serving[0].reason if serving else f"kernels take float32, bfloat16 and float16, not {dtypes}"
        raise ValueError(f"fused_layers=True: {reason}; leave it out")
    fused: list[tuple[nn.Module, Callable]] = []
    reasons: Counter[str] = Counter()
    for module in model.modules():
        forward = _fused_forward(module)
        if forward is None:
            continue
        reason = _why_not(module, forward)
        if reason:
            reasons[f"{type(module).__name__}: {reason}"] += 1
        else:
            fused.append((module, forward))
    rotaries = list(_rotary_modules(model))
    if not fused and not rotaries:
        found = "; ".join(reasons) or "the code of its norms, MLPs and rotary embeddings is none that is known"
        raise ValueError(f"fused_layers=True: nothing of {type(model).__name__} can be fused: {found}; leave it out")
    for reason, count in reasons.items():
        logger.warning(f"fused_layers: {count} modules run as before. {reason}.")
    change = changes.get_or_add(FUSED_LAYERS, "norms, gated MLPs and rotary embeddings run in one pass each")
    for module, forward in fused:
        change.set_class(module, _fused_class(cast("Any", type(module)), forward))
    for modeling in rotaries:
        plain = getattr(modeling, _ROTARY)
        setattr(modeling, _ROTARY, _fused_rotary(plain))
        change.on_undo(_restore_function, modeling.__name__, plain)


def _restore_function(module: str, function: Callable) -> None:
    setattr(sys.modules[module], _ROTARY, function)


# ---- what code computes


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
        attribute = "eps" if node.attr in _EPS_NAMES else node.attr
        return ast.Attribute(self.visit(node.value), attribute, node.ctx)


@functools.cache
def _meaning_of_source(source: str) -> str:
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        return ""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    renamed = _Renamed()
    arguments = renamed.visit(function.args)
    return ast.dump(arguments) + "".join(ast.dump(renamed.visit(statement)) for statement in body)


@functools.cache
def _meaning(function: Callable | None) -> str:
    """Returns what a function does, whatever its variables are called; empty if it has no source."""
    try:
        return _meaning_of_source(inspect.getsource(inspect.unwrap(cast("Callable", function))))
    except (OSError, TypeError, SyntaxError):
        return ""


def _does(function: Callable | None, *known: str) -> bool:
    return _meaning(function) in [_meaning_of_source(source) for source in known]


@functools.cache
def _kind(cls: type[nn.Module]) -> str | None:
    """Returns what a class of modules computes: "llama" and "gemma" are norms, "mlp" is a gated MLP."""
    if _does(cls.forward, _LLAMA_NORM):
        return "llama"
    if _does(cls.forward, _GEMMA_NORM) and _does(getattr(cls, "_norm", None), _GEMMA_NORM_HELPER):
        return "gemma"
    return "mlp" if _does(cls.forward, *_GATED_MLPS) else None


# ---- modules


def _fused_forward(module: nn.Module) -> Callable | None:
    """Returns the forward in one pass of a module that has one; None for others, and if its forward is exchanged."""
    kind = _kind(cast("Any", type(module)))
    if kind is None or "forward" in vars(module):
        return None
    if kind == "mlp":
        activation = _activation_of(cast("Any", module).act_fn)
        return None if activation is None else _mlp_forward(activation)
    return _norm_forward(kind, next(name for name in _EPS_NAMES if hasattr(module, name)))


@functools.cache
def _norm_forward(cast_as: Any, eps_name: str) -> Callable:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super(self.fused_class, self).forward(hidden_states)
        return rms_norm(hidden_states, self.weight, getattr(self, eps_name), cast=cast_as)

    return forward


@functools.cache
def _mlp_forward(activation: str) -> Callable:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype or gate.shape != up.shape:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(gated_activation(gate, up, activation))

    return forward


def _activation_of(function: object) -> str | None:
    """Returns the name of the activation that a function computes, by its numbers; None if it is not known."""
    if not callable(function) or (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
        return None
    x = torch.linspace(-6, 6, 193)
    with torch.no_grad():
        found = function(x.clone())
        for name in ACTIVATIONS:
            known = gated_activation(x, torch.ones_like(x), name, backend="torch")
            if isinstance(found, torch.Tensor) and torch.allclose(found, known, rtol=0, atol=2e-6):
                return name
    return None


@functools.cache
def _fused_class(cls: type[nn.Module], forward: Callable) -> type[nn.Module]:
    """Returns a class with another forward under its name: transformers, PEFT and `print` tell modules by it."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    made = type(cls.__name__, (cls,), named)
    cast("Any", made).fused_class = made
    return made


def _why_not(module: nn.Module, forward: Callable) -> str:
    """Tries a forward on a module; returns why it does not serve, empty if results and gradients are the module's."""
    weights = list(module.parameters())
    if any(map(is_partitioned, weights)):
        return "its weights are in parts when the model is made, so that it cannot be tried"
    first = weights[0]
    if first.is_meta or isinstance(first, torch._subclasses.FakeTensor):
        return "its weights are not there, so that it cannot be tried"
    dtype = first.dtype if first.dtype in KERNEL_DTYPES else torch.float32
    width = first.shape[0] if first.dim() == 1 else getattr(cast("Any", module).gate_proj, "in_features", None)
    if width is None:
        return "its gate_proj is no linear layer"
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(first.device, dtype)
    before, made = type(module), _fused_class(cast("Any", type(module)), forward)
    # Dropout of adapters would draw other numbers.
    with evaluating(module):
        plain = _results(lambda t: before.forward(module, t), x, weights)
        module.__class__ = made
        try:
            ours = _results(lambda t: made.forward(module, t), x, weights)
        finally:
            module.__class__ = before
    return "" if _agree(ours, plain) else "its numbers are others than those of the module's own code"


def _results(function: Callable, x: torch.Tensor, weights: list[nn.Parameter]) -> list[torch.Tensor]:
    """Returns a function's result for x, and the gradients by x and by the weights that train for some of its own."""
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *(weight for weight in weights if weight.requires_grad)]
    with torch.enable_grad():
        out = function(leaf)
        grads = torch.autograd.grad(
            out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out), materialize_grads=True
        )
    return [out.detach(), *grads]


def _agree(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> bool:
    """Tells whether results are the same but for roundings."""
    if [t.shape for t in ours] != [t.shape for t in plain] or [t.dtype for t in ours] != [t.dtype for t in plain]:
        return False
    pairs = ((a.float(), b.float(), _TOLERANCES[b.dtype]) for a, b in zip(ours, plain, strict=True))
    return all(bool(((a - b).abs().max() <= tolerance * b.abs().max()).item()) for a, b, tolerance in pairs)


# ---- rotary embeddings


def _rotary_modules(model: PreTrainedModel) -> Iterator[ModuleType]:
    """Yields the Python modules of a model's code whose function that turns queries and keys is known and serves."""
    names = {original_class(module).__module__ for module in model.modules()}
    for modeling in (sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")):
        plain = getattr(modeling, _ROTARY, None)
        known = _does(plain, _APPLY_ROTARY) and _does(getattr(modeling, "rotate_half", None), _ROTATE_HALF)
        if plain is not None and known and not hasattr(plain, "fused_from") and _turns_alike(plain):
            yield modeling


def _turns_alike(plain: Callable) -> bool:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    query, key, cos, sin = draw(2, 3, 5, 8), draw(2, 1, 5, 8), draw(2, 5, 8), draw(2, 5, 8)
    both = []
    for function in (_fused_rotary(plain), plain):
        turned_query = _results(lambda q, function=function: function(q, key, cos, sin)[0], query, [])
        both.append(turned_query + _results(lambda k, function=function: function(query, k, cos, sin)[1], key, []))
    return _agree(*both)


def _fused_rotary(plain: Callable) -> Callable:
    """Returns the function in one pass, which calls the plain one with what the kernels do not take."""

    @functools.wraps(plain)
    def turn(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim != 1 or not _can_turn(q, k, cos, sin):
            return plain(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin)

    cast("Any", turn).fused_from = plain
    return turn


def _can_turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or q.device.type != "cpu":
        return False
    one_dtype = q.dtype == k.dtype == cos.dtype == sin.dtype and q.dtype in KERNEL_DTYPES
    shapes = (q.shape[0], *q.shape[2:]), (k.shape[0], *k.shape[2:])
    fits = shapes[0] == shapes[1] and cos.shape[1:] == q.shape[2:] and cos.shape[0] in (1, q.shape[0])
    return one_dtype and fits and q.shape[-1] % 2 == 0 and not (cos.requires_grad or sin.requires_grad)
