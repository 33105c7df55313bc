"""Attaches what computes in one pass to a model: looks what is known of it, tries it out, and exchanges it."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trl_fast.modeling.loading import whole_backbone
from trl_fast.modeling.model_changes import changes_of, has_change
from trl_fast.ops.backends import KERNEL_DTYPES
from trl_fast.ops.device import device_facts
from trl_fast.parallel.engines import original_class

from .fused_classes import fused_class_for
from .joint_projections import joint_class_for, why_not_joint
from .kernels import kernel_for
from .known_code import GATED_MLP, NORM, known_class
from .plain_modules import plain_class_for, plain_kind
from .projections import why_joint_differs
from .residual_sums import layer_class_for
from .rotary_functions import (
    RotaryFunction,
    restore_function,
    rotary_functions,
    turns_after_norms,
    why_rotary_differs,
)
from .try_outs import why_class_differs
from .turned_norms import turning_attention, why_attention_differs

logger = logging.getLogger(__name__)

FUSED_LAYERS = "fused layers"
# The op of each kind of module; what is not here is computed by PyTorch, whatever the device.
_OPS = {NORM: "rms_norm", GATED_MLP: "gated_activation"}


def restore_layers(model: PreTrainedModel) -> None:
    """Gives the layers of a model their own code back, where they were fused.

    They stay as they are where something has been put on top since, as FSDP2 puts classes; a line says so.
    """
    changes = changes_of(model)
    if FUSED_LAYERS not in changes:
        return
    try:
        changes.undo(FUSED_LAYERS)
    except RuntimeError as error:
        _say_once(f"fused_layers: layers of {type(model).__name__} stay fused after training: {error}.")


def fuse_layers(model: PreTrainedModel, device: torch.device, *, required: bool = False) -> None:
    """Lets what a model has of norms, gated MLPs and rotary embeddings run in one pass each.

    Args:
        device: where the model will train; its weights may be elsewhere still.
        required: whether it is an error if nothing can be fused; else one line says why.

    Raises:
        ValueError: nothing of the model can be fused, and it is required; the message has the reasons.
    """
    changes = changes_of(model)
    if FUSED_LAYERS in changes:
        # Another model of the family may have given the functions back.
        for function in rotary_functions(model):
            if not _why_not_turned(function, model, device):
                _exchange(function, model)
        return
    found, name = _look(model, device), type(model).__name__
    if not (found.modules or found.plain or found.rotaries):
        known = "; ".join(found.reasons) or "the code of its norms, MLPs and rotary embeddings is none that is known"
        if required:
            raise ValueError(f"fused_layers=True: nothing of {name} can be fused: {known}; leave it out")
        _say_once(f"fused_layers: nothing of {name} runs in one pass: {known}.")
        return
    _say_once(f"fused_layers: of {name} {found.counts()} run in one pass each.")
    for reason, count in found.reasons.items():
        _say_once(f"fused_layers: {count} modules of {name} run as before. {reason}.")
    change = changes.get_or_add(FUSED_LAYERS, "norms, gated MLPs and rotary embeddings run in one pass each")
    # The class of a module whose projections are joint does what that of its attention does, too.
    attentions = {**dict(found.attentions), **dict(found.joint)}
    for module, fused in (*found.modules, *found.layers, *attentions.items(), *found.plain):
        change.set_class(module, fused)
    for function in found.rotaries:
        _exchange(function, model)
        change.on_undo(restore_function, function.module, function.known.name)


# Models that use a function in one pass, by its Python module and name.
_users: dict[tuple[str, str], weakref.WeakSet[PreTrainedModel]] = {}


def _exchange(function: RotaryFunction, model: PreTrainedModel) -> None:
    """Exchanges a function that a model's family shares; it comes back when the last fused model of these is gone."""
    function.exchange()
    key = function.module, function.known.name
    users = _users.setdefault(key, weakref.WeakSet())
    if model not in users:
        users.add(model)
        weakref.finalize(model, _restore_unused, *key).atexit = False


def _restore_unused(module: str, name: str) -> None:
    if not any(has_change(model, FUSED_LAYERS) for model in _users[module, name]):
        restore_function(module, name)


@functools.cache
def _say_once(line: str) -> None:
    logger.info(line)


@dataclass
class _Found:
    """Holds what can be exchanged on a model, and why the rest cannot, each reason with how often it was met."""

    modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    layers: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    attentions: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    joint: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    plain: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    rotaries: list[RotaryFunction] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def counts(self) -> str:
        kinds = Counter(known.kind for module, _ in self.modules if (known := known_class(module)) is not None)
        parts = [f"{count} {kind}s" for kind, count in kinds.items()]
        parts += [f"sums in {len(self.layers)} layers"] if self.layers else []
        plain = Counter(plain_kind(module) for module, _ in self.plain)
        parts += [f"{count} {kind}s" for kind, count in plain.items()]
        parts += ["rotary embeddings"] if self.rotaries else []
        parts += [f"with norms of queries and keys in {len(self.attentions)} layers"] if self.attentions else []
        parts += [f"sums of projections' gradients in {len(self.joint)} modules"] if self.joint else []
        return ", ".join(parts)


def _look(model: PreTrainedModel, device: torch.device) -> _Found:
    found = _Found()
    for module, fused in _candidates(model):
        reason = _why_not_fused(module, fused, device)
        if reason:
            found.reasons[reason] += 1
        else:
            found.modules.append((module, fused))
    norms = {module for module, fused in found.modules if hasattr(fused, "add_and_normalize")}
    found.layers = list(_layers_that_add(model, norms))
    # The head's products are those of ops.head.
    for module in whole_backbone(model).modules():
        fused_plain = None if _is_shared_out(module) else plain_class_for(module, device)
        if fused_plain is not None:
            found.plain.append((module, fused_plain))
    for function in rotary_functions(model):
        reason = _why_not_turned(function, model, device)
        if reason:
            found.reasons[reason] += 1
        else:
            found.rotaries.append(function)
    _find_attentions(model, found, device)
    _find_joint_projections(model, found, device)
    return found


def _candidates(model: PreTrainedModel) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    for module in model.modules():
        fused = fused_class_for(module)
        if fused is not None:
            yield module, fused


def _layers_that_add(
    model: PreTrainedModel, norms: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Yields layers, and the class of each that adds a residual and normalises the sum by a fused norm at once."""
    for module in model.modules():
        fused = None if "forward" in vars(module) else layer_class_for(module, norms)
        if fused is not None:
            yield module, fused


def _find_attentions(model: PreTrainedModel, found: _Found, device: torch.device) -> None:
    """Adds to what was found the attentions that can normalise and turn queries and keys at once."""
    fused_norms = {module: fused for module, fused in found.modules if hasattr(fused, "settings")}
    for module in model.modules():
        turning = turning_attention(module)
        turns = [] if turning is None else turns_after_norms(original_class(module).__module__, found.rotaries)
        if turning is None or not turns or not fused_norms.keys() >= {turning.query_norm, turning.key_norm}:
            continue
        reason = _why_not_at_once(module, turning.query_norm, fused_norms[turning.query_norm], turns, device)
        if reason:
            found.reasons[reason] += 1
        else:
            found.attentions.append((module, turning.cls))


def _find_joint_projections(model: PreTrainedModel, found: _Found, device: torch.device) -> None:
    """Adds to what was found the modules whose linear layers read one input; fused MLPs see to theirs."""
    taken, turning = {module for module, _ in (*found.modules, *found.layers)}, dict(found.attentions)
    for module in whole_backbone(model).modules():
        if module in taken or "forward" in vars(module):
            continue
        joint = joint_class_for(module, turns=module in turning)
        reason = why_not_joint(module) if joint is None else _why_differs(module, device)
        if reason:
            found.reasons[reason] += 1
        elif joint is not None:
            found.joint.append((module, joint))


def _why_differs(module: nn.Module, device: torch.device) -> str:
    reason = "" if _is_planned(device) else why_joint_differs(device, _dtype_of(module))
    return f"{type(module).__name__}: {reason}" if reason else ""


def _why_not_at_once(
    attention: nn.Module, norm: nn.Module, fused: type[nn.Module], turns: list[Callable], device: torch.device
) -> str:
    dtype = _dtype_of(norm)
    served = kernel_for("qk_norm_rotary", device, dtype)
    if not served.ok:
        return served.reason
    if _is_planned(device):
        return ""
    reasons = (why_attention_differs(attention, norm, fused, turn, device, dtype) for turn in turns)
    return next((f"{type(attention).__name__}: {reason}" for reason in reasons if reason), "")


def _why_not_fused(module: nn.Module, fused: type[nn.Module], device: torch.device) -> str:
    known, dtype = known_class(module), _dtype_of(module)
    assert known is not None, "it has a fused class"
    if known.kind in _OPS and not (served := kernel_for(_OPS[known.kind], device, dtype)).ok:
        return served.reason
    if _is_shared_out(module):
        return f"{type(module).__name__}: tensor parallelism shares its weights"
    reason = "" if _is_planned(device) else why_class_differs(module, fused, device, dtype)
    return f"{type(module).__name__}: {reason}" if reason else ""


def _why_not_turned(function: RotaryFunction, model: PreTrainedModel, device: torch.device) -> str:
    dtype = _dtype_of(model)
    served = kernel_for("rotary", device, dtype)
    if not served.ok:
        return served.reason
    reason = "" if _is_planned(device) else why_rotary_differs(function, device, dtype)
    return f"{function.known.name}: {reason}" if reason else ""


def _is_shared_out(module: nn.Module) -> bool:
    """Tells whether tensor parallelism shares a module's weights."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the first dtype of a module's weights that kernels take; float32 without one."""
    dtypes = (weight.dtype for weight in module.parameters())
    return next((dtype for dtype in dtypes if dtype in KERNEL_DTYPES), torch.float32)


def _is_planned(device: torch.device) -> bool:
    """Tells whether a device is simulated: there is nothing to try kernels on."""
    return device_facts(device).serves is not None
