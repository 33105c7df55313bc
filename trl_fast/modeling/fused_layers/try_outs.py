"""Tries what computes in one pass on a few numbers against a module's own code: results and gradients.

What is tried of a module is a stand-in, small and with random weights: its own may be large, elsewhere, in parts, or
not there yet. What has been tried once is known for all modules of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

# How far results may be from the module's own, as a share of the largest: some roundings.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
_HIDDEN, _INTERMEDIATE, _ROWS = 16, 24, 3
# Why a class does not serve, by all that this may depend on.
_found: dict[tuple[object, ...], str] = {}


def why_class_differs(module: nn.Module, fused: type[nn.Module], device: torch.device, dtype: torch.dtype) -> str:
    """Tries a class in the place of a module's own; returns why it does not serve, empty if all numbers agree.

    device, dtype: where the module will compute, and in what.
    """
    width = norm_width(module)
    key = type(module), fused, width, device, dtype
    if key not in _found:
        draw = Draw(device, dtype)
        plain = stand_in(module, width, draw)
        ours, x = in_class(plain, fused), draw(_ROWS, width)
        _found[key] = why_functions_differ(plain.forward, ours.forward, [x], list(plain.parameters()))
    return _found[key]


def norm_width(module: nn.Module) -> int:
    """Returns the length of a norm's weight, wherever the weight is; some number for modules without one."""
    weight: Any = getattr(module, "weight", None)
    return _HIDDEN if weight is None else getattr(weight, "ds_shape", weight.shape)[0]


def in_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Returns a module of that class with the weights and settings of another."""
    made = cls.__new__(cls)
    vars(made).update(vars(module))
    return made


class Draw:
    """Draws random numbers of one device and dtype, the same ones each time that it is made."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Returns normal numbers of that shape."""
        with unset_fake_temporarily():
            return torch.randn(shape, generator=self._generator, device="cpu").to(self.device, self.dtype)


def why_functions_differ(
    plain: Callable, ours: Callable, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] = ()
) -> str:
    """Returns why one function does not serve for another; empty if results and gradients agree but for roundings.

    inputs: what both are given, floats of any shape; weights: what they read besides, of any shape.
    """
    try:
        with unset_fake_temporarily(), torch.autocast(inputs[0].device.type, enabled=False):
            got, expected = (_results(function, inputs, weights) for function in (ours, plain))
    except Exception as error:  # A kernel that does not compile or start, in whatever way.
        return f"it failed when tried ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return "" if _agree(got, expected) else "its numbers are others than those of the module's own code"


def stand_in(module: Any, width: int, draw: Draw) -> nn.Module:
    """Returns a module of the same class and settings with random weights of its own."""
    cls = cast("Any", type(module))
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}
    vars(made).update({**public, "training": False})
    for name in module._parameters:
        made.register_parameter(name, nn.Parameter(1 + draw(width) / 4))
    for name, child in module._modules.items():
        sizes = _SIZES.get(name)
        setattr(made, name, child if sizes is None else _linear(*sizes, draw))
    return made


# Inputs and outputs of an MLP's layers.
_SIZES = {
    "gate_proj": (_HIDDEN, _INTERMEDIATE),
    "up_proj": (_HIDDEN, _INTERMEDIATE),
    "gate_up_proj": (_HIDDEN, 2 * _INTERMEDIATE),
    "down_proj": (_INTERMEDIATE, _HIDDEN),
}


def _linear(inputs: int, outputs: int, draw: Draw) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(draw(outputs, inputs) / inputs**0.5)
    return layer


def _results(
    function: Callable, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Returns a function's results, and the gradients by its inputs and weights for some of its own."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        given = function(*leaves)
        results = [given] if isinstance(given, torch.Tensor) else list(given)
        weighed = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in results]
        grads = torch.autograd.grad(results, [*leaves, *weights], weighed, materialize_grads=True)
    return [*(out.detach() for out in results), *grads]


def _agree(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> bool:
    """Tells whether results are the same but for roundings."""
    if [t.shape for t in ours] != [t.shape for t in plain] or [t.dtype for t in ours] != [t.dtype for t in plain]:
        return False
    pairs = ((a.float(), b.float(), _TOLERANCES[b.dtype]) for a, b in zip(ours, plain, strict=True))
    return all(bool(((a - b).abs().max() <= tolerance * b.abs().max()).item()) for a, b, tolerance in pairs)
