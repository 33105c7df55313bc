"""Attention over a packed row: every sequence attends to itself, causally, and to nothing else.

Registered with transformers under SEGMENT_ATTENTION. The sequences' lengths travel as a keyword of the model's forward
down to here. Where they are absent (generation, a plain forward) the model gets transformers' SDPA attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEGMENT_ATTENTION = "trl_fast_segments"
# The keyword that carries the lengths.
LENGTHS_KEYWORD = "sequence_lengths"
_REPLACEABLE = ("sdpa", "eager", SEGMENT_ATTENTION)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sequence of a packed row.

    Args:
        query: (1, heads, T, D); key, value: (1, key-value heads, T, D); any float dtype.
        attention_mask: ignored when sequence_lengths is given.
        sequence_lengths: lengths of the sequences in the row, summing to T; None hands over to SDPA.

    Returns:
        (1, T, heads, D) and None, as transformers expects.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.shape[1] != key.shape[1]
    lengths = list(sequence_lengths)
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)


def packed_inputs(sequence_lengths: tuple[int, ...], like: torch.Tensor) -> Mapping[str, object]:
    """Keywords of the model's forward that make it attend within `sequence_lengths`.

    A four-dimensional mask passes through transformers' mask building untouched: without it, transformers would see
    position ids that restart and build a dense T x T mask.
    """
    return {LENGTHS_KEYWORD: sequence_lengths, "attention_mask": torch.zeros(1, 1, 1, 1, device=like.device)}


def supports_packed(model: PreTrainedModel, max_length: int | None) -> tuple[bool, str]:
    """Whether a model's architecture can run packed rows through `segment_attention`, and why not.

    This reads declarations; `verify` in scoring.py then compares numbers, for what no declaration tells.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(config, "attn_logit_softcapping", None):
        return False, f"{name} caps its attention logits, which SDPA cannot"
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)):
        return False, f"{name} does not take its attention function from transformers' AttentionInterface"
    if config._attn_implementation not in _REPLACEABLE:
        return False, f"attn_implementation={config._attn_implementation!r} was chosen, which takes no segments"
    if getattr(config, "alibi", False):
        return False, f"{name} has ALiBi position biases"
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention", "attention"}
    if other:
        return False, f"{name} has layers of other kinds than attention: {sorted(other)}"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else bool(window) and getattr(config, "use_sliding_window", True)
    if slides and window and (max_length is None or window < max_length):
        return False, f"{name} has a sliding window of {window} tokens, shorter than max_length={max_length}"
    return True, "every layer is full attention"


def use_segment_attention(model: PreTrainedModel) -> None:
    """Switches a model to `segment_attention`; without the lengths keyword it behaves as with SDPA."""
    model.set_attn_implementation(SEGMENT_ATTENTION)
