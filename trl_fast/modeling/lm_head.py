"""Reads a language-model head as the ops need it: its weight, its bias, and what is done to its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trl_fast.ops.head.low_rank_weight import LowRankFactors, LowRankWeight
from trl_fast.ops.head.transient_weight import FrozenWeight, TransientWeight
from trl_fast.ops.head.vocabulary_shard import VocabularyShard

from .low_bit_layers import bits_of, dequantized_weight
from .model_changes import changes_of
from .tied_weight import weight_of_head
from .vocabulary_parallel import own_columns

FLOAT32_HEAD = "float32 head"


class HeadParameters(NamedTuple):
    """Holds a head's weight (V, H) and bias (V,) or None, of one float dtype; differentiable if they train.

    shard: which columns of the vocabulary these V are, where other processes have the others. source: how the weight
    is made again in backward and what trains of it, where it is not to be kept.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    shard: VocabularyShard | None = None
    source: TransientWeight | None = None


class HeadTransform(NamedTuple):
    """Holds the transform of raw logits z: `softcap * tanh(logit_scale * z / softcap)`."""

    softcap: float | None
    logit_scale: float


def head_transform(config: PretrainedConfig) -> HeadTransform:
    """Reads the transform from a model's config, under the names that the families use.

    Gemma: final_logit_softcapping. Cohere: logit_scale. Muse: output_multiplier. Falcon-H1: lm_head_multiplier.
    Granite and MiniCPM divide by logits_scaling, HyperCLOVA X multiplies by it.
    """
    config = config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return HeadTransform(getattr(config, "final_logit_softcapping", None), 1.0 if scale is None else float(scale))


def head_parameters(model: PreTrainedModel, *, transient: bool = False) -> HeadParameters:
    """Returns the head's present weight and bias: with a LoRA adapter added in, or of a saved copy.

    Where tensor parallelism has dealt the head to several processes, they are this process's columns of it. transient:
    the sum of a weight and an adapter is not to be kept for the backward pass.

    Raises:
        ValueError: the model has no head, or an adapter on it cannot be written as a weight.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; expected a causal language model")
    if isinstance(head, ModulesToSaveWrapper):
        head = active_copy(head)
    if isinstance(head, BaseTunerLayer):
        return _adapted(head, transient)
    if bits_of(head):
        return _low_bit_head(head, model.dtype)
    return HeadParameters(*own_columns(weight_of_head(model, head), getattr(head, "bias", None)))


def _low_bit_head(head: nn.Module, dtype: torch.dtype) -> HeadParameters:
    """Returns a head of 4 or 8 bits, whose weight is made whole in a dtype anew for each pass."""
    bias: Any = getattr(head, "bias", None)

    def whole() -> torch.Tensor:
        return dequantized_weight(head).to(dtype)

    source = FrozenWeight(whole) if torch.is_grad_enabled() else None
    return HeadParameters(whole(), None if bias is None else bias.to(dtype), source=source)


def active_copy(head: ModulesToSaveWrapper) -> torch.nn.Module:
    """Returns the copy of a head that its adapter trains, or the head itself while the adapter is switched off."""
    saved = not head.disable_adapters and head.active_adapters[0] in head.modules_to_save
    return head.modules_to_save[head.active_adapters[0]] if saved else head.original_module


def _adapted(head: BaseTunerLayer, transient: bool) -> HeadParameters:
    base: Any = head.get_base_layer()
    weight, bias = base.weight, getattr(base, "bias", None)
    if head.disable_adapters or head.merged:
        return HeadParameters(*own_columns(weight, bias))
    adapters = [_adapter_of(head, name) for name in head.active_adapters]
    for added in (each.bias for each in adapters if each.bias is not None):  # lora_bias=True
        bias = added if bias is None else bias + added
    adapted = LowRankWeight(weight, [each.factors for each in adapters])
    if transient and torch.is_grad_enabled() and not weight.requires_grad:
        with torch.no_grad():
            return HeadParameters(adapted.whole(), bias, source=adapted)
    return HeadParameters(adapted.whole(), bias)


class _Adapter(NamedTuple):
    """Holds an adapter: its factors, and what it adds to the bias, (V,) or None."""

    factors: LowRankFactors
    bias: torch.Tensor | None


def _adapter_of(head: BaseTunerLayer, adapter: str) -> _Adapter:
    """Returns an adapter on a head, by its name.

    Raises:
        ValueError: it cannot be written as a weight.
    """
    if not isinstance(head, LoraLinear) or adapter in head.lora_variant:
        raise ValueError(
            f"peft_config: the adapter on the head ({type(head).__name__}) cannot be added to its weight; "
            "use plain LoRA there, or leave the head out of target_modules"
        )
    if getattr(head.lora_dropout[adapter], "p", 0.0) > 0 and head.training:
        raise ValueError(
            "peft_config: lora_dropout on the head cannot be fused; set lora_dropout=0 or leave the head out of "
            "target_modules"
        )
    down: Any = head.lora_A[adapter]
    up: Any = head.lora_B[adapter]
    scale = head.scaling[adapter]
    return _Adapter(LowRankFactors(down.weight, up.weight, scale), None if up.bias is None else up.bias * scale)


def use_float32_head(model: PreTrainedModel) -> None:
    """Keeps the head's weight in float32 and its logits too, whatever the dtype of the layers under it.

    Where the head is tied to the embeddings, those become float32 with it; what they give keeps its dtype.

    Raises:
        ValueError: the head carries an adapter, or is held in 4 or 8 bits.
    """
    changes = changes_of(model)
    if FLOAT32_HEAD in changes:
        return
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ValueError("cast_lm_head_to_fp32=True: the head carries an adapter; leave it out of target_modules")
    if bits_of(head):
        raise ValueError(
            f"cast_lm_head_to_fp32=True: the head is held in {bits_of(head)} bits; load the model with it in "
            "llm_int8_skip_modules of the BitsAndBytesConfig"
        )
    dtype = head.weight.dtype
    change = changes.get_or_add(FLOAT32_HEAD, "the head's weight and logits are float32")
    change.on_undo(torch.nn.Module.to, head, dtype)
    head.float()
    change.add_hook(
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))
    )
    embeddings = model.get_input_embeddings()
    if embeddings.weight is head.weight:
        change.add_hook(embeddings.register_forward_hook(lambda module, inputs, output: output.to(dtype)))
    change.set(model, "trl_fast_float32_head", True)


def has_float32_head(model: PreTrainedModel) -> bool:
    """Returns whether `use_float32_head` has been called."""
    return getattr(model, "trl_fast_float32_head", False)
