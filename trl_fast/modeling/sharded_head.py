"""Makes a head's parameters whole for the time of a call, whatever engine holds them in parts.

FSDP and ZeRO-3 gather a module's parameters in hooks around its call, and around the backward pass of what the call
returned: before that pass the parameters are whole again, and after it their gradients are summed over the processes.
Nobody calls a head here, since it would return all logits at once. So its modules are called with another forward,
which reads their parameters: where several hold them (an adapter's two factors, a saved copy), one inside the other.
All hooks then run as in the model's own forward, and no engine needs a way of its own.

Nothing whole is kept from forward to backward: a weight's tensor is empty in between, sums with adapters and float32
copies are made again (`ops/head/transient_weight.py`).

FSDP2 and ZeRO-3 let the gradient of a weight be given to the part that a process holds. So the gradient is summed
over the processes a vocabulary tile at a time, and never exists whole (`ops/head/weight_shard.py`). FSDP1 takes one
gradient of all that it has sharded together.

Tensor parallelism alone leaves a head as it is: each process has columns of the vocabulary (vocabulary_parallel.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from trl_fast.ops.head.transient_weight import FrozenWeight, TransientWeight, WholeWeight
from trl_fast.ops.head.weight_shard import WeightShard
from trl_fast.parallel.partitions import is_partitioned, part_with_gradient, whole_shape

from .lm_head import HeadParameters, active_copy, has_float32_head, head_parameters
from .model_changes import replaced_forward

# Tensors by names, from hidden states and the parameters of a head.
ReadHead = Callable[[torch.Tensor, HeadParameters], Mapping[str, torch.Tensor]]


def call_with_whole_head(model: PreTrainedModel, read: ReadHead, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what `read` makes of hidden states (N, H) and the head's parameters, which are whole while it runs.

    They are whole too while the backward pass goes through the tensors that `read` returns. An engine frees them after
    each pass: `read` is not to copy them.

    Raises:
        NotImplementedError: the head is in parts that no hook gathers.
        ValueError: as in `head_parameters`; or the head is to be float32 and the engine has cast it.
    """
    modules = [module for module in _modules_of_head(model) if _has_gathering_hooks(module)]
    if not modules:
        return dict(read(hidden, _upcast(_whole_head(model, []), hidden)))
    alone = _gathered_alone(modules)
    # Hooks may keep and cast what they see: only what has a gradient goes through them.
    constants: dict[str, torch.Tensor] = {}

    def innermost(given: torch.Tensor) -> dict[str, torch.Tensor]:
        # FSDP2 casts it, also to a head that is to be float32.
        given = given.to(hidden.dtype) if has_float32_head(model) else given
        found = read(given, _whole_head(model, modules))
        # FSDP2's hook would gather before the backward pass of what it sees.
        unseen = {name: tensor for name, tensor in found.items() if alone is not None or not tensor.requires_grad}
        constants.update(unseen)
        return {name: tensor for name, tensor in found.items() if name not in unseen}

    found = _call_nested(modules, innermost, hidden)
    if alone is not None:
        _leave_out_of_backward(alone)
    if not torch.is_grad_enabled() or _frees_after_forward(model):
        _free_weights(modules)
    return {**found, **constants}


def is_whole_in_forward_only(model: PreTrainedModel) -> bool:
    """Tells whether nothing gathers a model's head by itself: FSDP1 has it with all that stands outside of layers."""
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return sharded and not any(map(_has_gathering_hooks, _modules_of_head(model)))


def _upcast(head: HeadParameters, hidden: torch.Tensor) -> HeadParameters:
    """Returns a 16-bit head in float32 where the hidden states are, as one that QLoRA trains beside float32 layers."""
    weight, bias = head.weight, head.bias
    is_narrower = hidden.dtype == torch.float32 and weight.dtype != torch.float32 and head.source is None
    if not is_narrower or torch.is_autocast_enabled(hidden.device.type):
        return head
    return head._replace(weight=weight.float(), bias=None if bias is None else bias.float())


def _free_weights(modules: list[nn.Module]) -> None:
    """Frees a head that FSDP2 keeps whole for a backward pass, before which its hook then gathers it again."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def _frees_after_forward(model: PreTrainedModel) -> bool:
    """Tells whether FSDP2 frees the weights of layers after forward; accelerate never has it do so for the head."""
    parts = (module for module in model.modules() if isinstance(module, FSDPModule))
    return any(group._reshard_after_forward for part in parts for group in part._get_fsdp_state()._fsdp_param_groups)


def _whole_head(model: PreTrainedModel, modules: list[nn.Module]) -> HeadParameters:
    """Returns the head, which is whole now; modules: those that hold its parameters and have hooks."""
    head = head_parameters(model, transient=bool(modules))
    weight = head.weight
    if isinstance(weight, DTensor):
        raise NotImplementedError(
            f"{type(model).__name__}: the head's weight is split over {weight.device_mesh}, and nothing gathers it; "
            "shard the model with FSDP or DeepSpeed ZeRO-3"
        )
    sharded = _sharded_by_fsdp2(weight, modules)
    if has_float32_head(model) and weight.dtype != torch.float32:
        return _float32_parameters(head, sharded)
    if head.source is not None or not torch.is_grad_enabled():
        return head
    if weight.requires_grad:
        return head._replace(source=_source_of(model, weight, sharded))
    frozen = _gathered_alone(modules)
    return head if frozen is None else head._replace(source=FrozenWeight(partial(_gathered_again, frozen, weight)))


def _gathered_alone(modules: list[nn.Module]) -> FSDPModule | None:
    """Returns the module of a frozen head that FSDP2 gathers alone: backward hardly ever reads its weight."""
    parts = [module for module in modules if isinstance(module, FSDPModule)]
    groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    trains = any(parameter.sharded_param.requires_grad for group in groups for parameter in group.fsdp_params)
    return parts[0] if len(groups) == 1 and len(groups[0].modules) == 1 and not trains else None


def _leave_out_of_backward(module: FSDPModule) -> None:
    """Takes a module, the last one that was called, out of those that FSDP2 gathers ahead of their backward pass."""
    (group,) = module._get_fsdp_state()._fsdp_param_groups
    order = group.comm_ctx.post_forward_order
    if order and order[-1] is group:
        order.pop()
        group._post_forward_indices.pop()


def _gathered_again(module: FSDPModule, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight (V, H) after its module has been gathered; FSDP2 frees it when backward has passed by."""
    module.unshard()
    return weight


def _source_of(model: PreTrainedModel, weight: torch.Tensor, sharded: DTensor | None) -> TransientWeight | None:
    """Returns how a trained weight (V, H) is whole again in backward, and who gets its gradient.

    sharded: the parameter in parts of which FSDP2 has gathered it, if so. None: it is kept, as FSDP1 does.
    """
    if sharded is not None:
        return _weight_shard(sharded, weight.shape, weight.device, lambda: weight) or WholeWeight(weight)
    if not is_partitioned(weight):
        return None
    # Embeddings have a gradient of their own, and ZeRO-3 takes one of a weight.
    tied = weight is getattr(model.get_input_embeddings(), "weight", None)
    part = None if tied else part_with_gradient(weight)
    if part is None:
        return WholeWeight(weight)
    group = weight.ds_process_group  # type: ignore[attr-defined]
    return WeightShard(lambda: weight, part, whole_shape(weight), part.numel(), group)


def _float32_parameters(head: HeadParameters, sharded: DTensor | None) -> HeadParameters:
    """Returns a head that is to be float32 as such, where an engine has gathered it in another dtype.

    The float32 weight is gathered anew in backward, where that needs it.
    """
    weight, trains = head.weight, head.weight.requires_grad and torch.is_grad_enabled()
    source: TransientWeight | None = None
    if sharded is not None and sharded.dtype == torch.float32:
        gather: Any = sharded.detach()
        gather = gather.full_tensor
        source = _weight_shard(sharded, weight.shape, weight.device, gather) if trains else FrozenWeight(gather)
    if source is None:
        raise ValueError(
            f"cast_lm_head_to_fp32=True: the engine has made the head's weight {weight.dtype}; train with FSDP2, "
            "whose processes keep it in float32, or set cast_lm_head_to_fp32=False"
        )
    with torch.no_grad():
        return head._replace(
            weight=source.whole(), bias=None if head.bias is None else head.bias.float(), source=source
        )


def _sharded_by_fsdp2(weight: torch.Tensor, modules: list[nn.Module]) -> DTensor | None:
    """Returns the parameter in parts of which FSDP2 has gathered a weight (V, H); None: it has not."""
    for module in modules:
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                if getattr(parameter, "_unsharded_param", None) is weight:
                    sharded: Any = parameter.sharded_param
                    return sharded
    return None


def _weight_shard(
    parameter: DTensor, shape: torch.Size, device: torch.device, whole: Callable[[], torch.Tensor]
) -> WeightShard | None:
    """Returns the shard of a parameter (V, H) whose rows, and nothing else, are dealt to processes.

    device: where the weight is whole; whole: returns it.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    replicated = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
    if len(sharded) != 1 or len(sharded) + len(replicated) != len(placements) or len(replicated) > 1:
        return None
    # Offloaded ones wait on the CPU.
    rows = parameter.to_local().to(device)
    group = mesh.get_group(sharded[0])
    replicas = mesh.get_group(replicated[0]) if replicated else None
    return WeightShard(whole, rows, shape, -(-shape[0] // group.size()) * shape[1], group, replicas)


def _modules_of_head(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that hold the parameters in use of a head, from the outermost to the innermost one."""
    head: Any = model.get_output_embeddings()
    modules = [head]
    if isinstance(head, ModulesToSaveWrapper):
        modules.append(active_copy(head))
    elif isinstance(head, BaseTunerLayer):
        modules.append(head.get_base_layer())
        if not (head.disable_adapters or head.merged):
            factors = (getattr(head, name, {}) for name in ("lora_A", "lora_B"))
            modules += [factor[adapter] for factor in factors for adapter in head.active_adapters if adapter in factor]
    return modules


def _has_gathering_hooks(module: nn.Module) -> bool:
    """Tells whether an engine makes parameters whole when the module is called."""
    if isinstance(module, FSDPModule | FullyShardedDataParallel):
        return True
    return any(hasattr(parameter, "ds_status") for parameter in module.parameters(recurse=False))


def _call_nested(
    modules: list[nn.Module], innermost: Callable[[torch.Tensor], dict[str, torch.Tensor]], hidden: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Calls the first module, whose forward calls the second one, and so on; the last one's forward is `innermost`."""
    if not modules:
        return innermost(hidden)
    first, *rest = modules
    with replaced_forward(first, lambda hidden: _call_nested(rest, innermost, hidden)):
        return first(hidden)
