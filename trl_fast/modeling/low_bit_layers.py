"""Trains on layers whose weights bitsandbytes holds in 4 or 8 bits: one product, adapters' dtype, whole weights."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers import PreTrainedModel

from .model_changes import Change, changes_of, unbound_forward

ONE_PRODUCT = "one product of low-bit layers"
ANY_INPUT = "inputs of any dtype"
# bitsandbytes' names; it is installed only where such layers are.
_KINDS = {"Params4bit": 4, "Int8Params": 8}
_REPACKS = "support_avx512bf16_for_cpu"


def bits_of(layer: nn.Module) -> int | None:
    """Returns the bits of a number of a layer's weight, 4 or 8; None of other layers."""
    return _KINDS.get(type(getattr(layer, "weight", None)).__name__)


def holds_packed_numbers(module: nn.Module) -> bool:
    """Tells whether the bytes of a module's weight are those of numbers of 4 bits, whatever its dtype says.

    bnb_4bit_quant_storage may be a dtype of floats, and a weight that an engine has sharded is of another class.
    """
    return type(module).__module__ == "bitsandbytes.nn.modules" and hasattr(module, "quant_state")


def dequantized_weight(layer: Any) -> torch.Tensor:
    """Returns a layer's weight (V, H) as a new tensor; of 4 bits in the dtype that it had before, of 8 in float32."""
    with torch.no_grad():
        return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).detach()


def train_in_bfloat16(model: PreTrainedModel | PeftModel) -> None:
    """Makes what trains on a quantised model bfloat16, as TRL does (QLoRA, arXiv 2305.14314).

    Linear layers that are trained whole, such as the head, take inputs of any dtype then: those of TRL only do under
    autocast.
    """
    for name, parameter in model.named_parameters():
        # DoRA's magnitudes take steps too small for bfloat16.
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    copies = [copy for wrapper in wrappers for copy in wrapper.modules_to_save.values() if isinstance(copy, nn.Linear)]
    changes = changes_of(model)
    if copies and ANY_INPUT not in changes:
        change = changes.get_or_add(ANY_INPUT, "layers that are trained whole take inputs of any dtype")
        for copy in copies:
            change.set(copy, "forward", types.MethodType(_forward_in_dtype_of_input, copy))


def _forward_in_dtype_of_input(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = layer.bias
    return F.linear(x, layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def compute_alike(model: PreTrainedModel) -> None:
    """Has a model's low-bit layers compute the same product in evaluation as in training, one that has a gradient.

    On a CPU bitsandbytes does not: in evaluation, layers of 8 bits round their inputs to 8 bits too, so that a rollout
    would come from another policy than the one that is scored; and those of 4 bits, with 16-bit products in hardware,
    are packed for good into a format without a gradient, so that training would lose that of all layers below. Layers
    of 8 bits do not keep their inputs for backward.

    Raises:
        ValueError: weights are packed so already.
    """
    layers = list(_low_bit_layers(model))
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{type(model).__name__}: its 4-bit weights were packed for inference when it ran in evaluation on "
                "this CPU, and have no gradient in that format; load the model anew and give it to the trainer before "
                "it runs"
            )
    if layers and ONE_PRODUCT not in changes_of(model):
        change = changes_of(model).get_or_add(ONE_PRODUCT, "low-bit layers evaluate as they train")
        for layer in layers:
            _compute_alike(layer, change)


def _low_bit_layers(model: PreTrainedModel) -> Iterator[Any]:
    return (module for module in model.modules() if bits_of(module) and not hasattr(module, "base_layer"))


def _compute_alike(layer: Any, change: Change) -> None:
    if bits_of(layer) == 8:
        change.set(layer, "trl_fast_forward", unbound_forward(layer))
        change.set(layer, "forward", types.MethodType(_forward_8_bits, layer))
    elif hasattr(layer, _REPACKS):
        change.set(layer, _REPACKS, False)


def _forward_8_bits(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Computes what the layer computes in training; its input is not kept."""
    training, layer.training = layer.training, True
    try:
        out = layer.trl_fast_forward(layer, x)
    finally:
        layer.training = training
    _forget_input(out.grad_fn)
    return out


def _forget_input(node: Any) -> None:
    """Lets go of what bitsandbytes keeps for the gradient of a weight, which has none.

    It does not keep it as autograd's saved tensors are kept, so that checkpointing and offloading would not see it.
    """
    if hasattr(node, "A"):
        node.A = None
    elif isinstance(getattr(node, "tensors", None), tuple):
        node.tensors = (*node.tensors[:2], None)
