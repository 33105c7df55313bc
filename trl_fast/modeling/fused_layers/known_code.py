"""Holds the code of norms and gated MLPs that is known."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from trl_fast.ops.layers import NormCast

from .code_meaning import does

NORM, LAYER_NORM, GATED_MLP = "norm", "layer norm", "gated MLP"


@dataclass(frozen=True, eq=False)
class KnownClass:
    """Describes what classes of modules compute.

    - `kind`: NORM (by the root mean square), LAYER_NORM (which subtracts the mean before) or GATED_MLP.
    - `methods`: the code of each method that has to be known, by its name.
    - `cast`: of a norm, where numbers are rounded, as ops.layers.rms_norm calls it.
    - `reads_weight`: of a norm, whether it has a weight, or may.
    - `gate_and_up`: of an MLP, whether one layer, `gate_up_proj`, gives both.
    - `activation`: of an MLP, the name of its activation.
    """

    kind: str
    methods: dict[str, str]
    cast: NormCast = "llama"
    reads_weight: bool = True
    gate_and_up: bool = False
    activation: str = ""


# Llama: 140 norms of transformers 5.23 are this one.
_LLAMA_NORM = """
def forward(self, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    return self.weight * x.to(dtype)
"""
# T5: the same for numbers of the weight's dtype.
_T5_NORM = """
def forward(self, x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        x = x.to(self.weight.dtype)
    return self.weight * x
"""
_GEMMA_NORM = """
def forward(self, x):
    out = self._norm(x.float())
    out = out * (1.0 + self.weight.float())
    return out.type_as(x)
"""
_ROOT_MEAN_SQUARE = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
"""
# OLMo 2 and 3, gpt-oss.
_OLMO_NORM = """
def forward(self, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    return (self.weight * x).to(dtype)
"""
# Gemma 3n and 4.
_SCALED_NORM = """
def forward(self, x):
    out = self._norm(x.float())
    if self.with_scale:
        out = out * self.weight.float()
    return out.type_as(x)
"""
# Without a weight: nanochat, Llama 4's queries and keys.
_BARE_NORM = """
def forward(self, x):
    return self._norm(x.float()).type_as(x)
"""
# Cohere: without a bias, and in float32 to the end.
_COHERE_NORM = """
def forward(self, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + self.eps)
    x = self.weight.to(torch.float32) * x
    return x.to(dtype)
"""
_POWER_OF_MEAN_SQUARE = """
def _norm(self, x):
    mean_squared = x.pow(2).mean(-1, keepdim=True) + self.eps
    return x * torch.pow(mean_squared, -0.5)
"""
# Phi-3, GLM.
_JOINT_MLP = """
def forward(self, x):
    up = self.gate_up_proj(x)
    gate, up = up.chunk(2, dim=-1)
    up = up * self.{activation}(gate)
    return self.down_proj(up)
"""
_MLPS = (
    """
def forward(self, x):
    out = self.down_proj(self.{activation}(self.gate_proj(x)) * self.up_proj(x))
    return out
""",
    """
def forward(self, x):
    return self.down_proj(self.{activation}(self.gate_proj(x)) * self.up_proj(x))
""",
)

KNOWN_CLASSES = (
    KnownClass(NORM, {"forward": _LLAMA_NORM}, cast="llama"),
    KnownClass(NORM, {"forward": _T5_NORM}, cast="llama"),
    KnownClass(NORM, {"forward": _GEMMA_NORM, "_norm": _ROOT_MEAN_SQUARE}, cast="gemma"),
    KnownClass(NORM, {"forward": _OLMO_NORM}, cast="olmo"),
    KnownClass(NORM, {"forward": _SCALED_NORM, "_norm": _POWER_OF_MEAN_SQUARE}, cast="olmo"),
    KnownClass(NORM, {"forward": _BARE_NORM, "_norm": _ROOT_MEAN_SQUARE}, reads_weight=False),
    KnownClass(LAYER_NORM, {"forward": _COHERE_NORM}),
    *(
        KnownClass(
            GATED_MLP, {"forward": source.format(activation=name)}, gate_and_up=source is _JOINT_MLP, activation=name
        )
        for name in ("act_fn", "activation_fn", "act")
        for source in (*_MLPS, _JOINT_MLP)
    ),
)


def known_class(module: nn.Module) -> KnownClass | None:
    """Returns what a module's class is known to compute; None if its code is none of these."""
    # A class of modules is hashable, which mypy does not see.
    return _known_class(cast("Any", type(module)))


@functools.cache
def _known_class(cls: type[nn.Module]) -> KnownClass | None:
    for known in KNOWN_CLASSES:
        if all(does(getattr(cls, name, None), source) for name, source in known.methods.items()):
            return known
    return None
