"""Tells of modules whether what they compute may be computed without calling them."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_bare(module: nn.Module) -> bool:
    """Tells whether nothing is put upon a module, so that what it computes may be computed without calling it."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    is_called_plainly = type(module).__call__ is nn.Module.__call__ and "forward" not in own
    return is_called_plainly and not hooks and not _has_any_global_hook()


def is_linear(module: nn.Module) -> bool:
    """Tells whether a module is PyTorch's linear layer, no subclass of it but the one that is made here."""
    return _is(nn.Linear, module)


def is_lora(module: nn.Module) -> bool:
    """Tells whether a module is PEFT's LoRA layer, no subclass of it but the one that is made here."""
    return _is(LoraLinear, module)


def _is(wanted: type[nn.Module], module: nn.Module) -> bool:
    cls = type(module)
    return cls is wanted or (cls.__base__ is wanted and hasattr(cls, "fused_class"))
