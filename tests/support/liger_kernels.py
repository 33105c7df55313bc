"""Stand-ins for kernels of others in a model's layers: they replace what Liger and the hub do, and write as they do.

Liger's write in place through pointers, which neither autograd nor a dispatch mode sees: rotary embeddings over
queries and keys, SwiGLU's backward over what it saved, a norm's backward over the gradient that it gets.
"""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import torch
from transformers.models.llama import modeling_llama


def write(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Writes into a tensor's memory, unseen."""
    target.detach().numpy()[...] = values.detach().numpy()
    return target


def rotated(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.angles = cos.unsqueeze(1), sin.unsqueeze(1)
        return tuple(write(x, rotated(x, *ctx.angles)).view_as(x) for x in (q, k))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.angles
        return *(rotated(grad, cos, -sin) for grad in (dq, dk)), None, None


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return Rotary.apply(q, k, cos, sin)


liger_rotary_pos_emb.__module__ = "liger_kernel.transformers.rope"


class SiLUMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        da, db = grad * b * sigmoid * (1 + a * (1 - sigmoid)), grad * a * sigmoid
        return write(a, da), write(b, db)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.contiguous(), x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        weighted = grad * weight
        found = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
        return write(grad, found), grad_weight, None


class Swiglu(torch.nn.Module):
    # Of all calls, the tokens.
    seen: ClassVar[set[int]] = set()

    def forward(self, x):
        # `self` is the model's module.
        Swiglu.seen.add(x.shape[:-1].numel())
        return self.down_proj(SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))


class RmsNorm(torch.nn.Module):
    def forward(self, hidden_states):
        return Norm.apply(hidden_states, self.weight, self.variance_epsilon)


def replace_layers(model) -> None:
    """Gives the norms and MLPs of a Llama model other forwards, instance by instance."""
    for module in model.modules():
        for old, new in ((modeling_llama.LlamaMLP, Swiglu), (modeling_llama.LlamaRMSNorm, RmsNorm)):
            if isinstance(module, old):
                module.__dict__["forward"] = types.MethodType(new.forward, module)


def put_liger_in_place(monkeypatch) -> None:
    """Has `use_liger_kernel` find a package that serves Llama on a CPU."""

    def apply(model, fused_linear_cross_entropy=True, **_):
        assert not fused_linear_cross_entropy
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
        replace_layers(model)

    transformers = types.ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = apply
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    package = types.ModuleType("liger_kernel")
    package.transformers, transformers.monkey_patch = transformers, patches
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, transformers.__name__, transformers)
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    for place in ("transformers.integrations.liger", "trl_fast.modeling.liger_kernels"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("trl_fast.modeling.liger_kernels.LIGER_DEVICES", ("cpu",))
    # Put back afterwards.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(Swiglu, "seen", set())


def put_hub_in_place(monkeypatch) -> list[bool]:
    """Has a model's `set_use_kernels` replace its layers; a list of the modes that it did so in."""
    modes = []

    def set_use_kernels(self, use_kernels, kernel_config=None, mode=None):
        self._use_kernels = use_kernels
        if use_kernels:
            modes.append(self.training)
            replace_layers(self)

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.set_use_kernels", set_use_kernels)
    monkeypatch.setattr(Swiglu, "seen", set())
    return modes
