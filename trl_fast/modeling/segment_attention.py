"""Switches a model to attention within the trees of a row, as transformers calls it.

Registered with transformers under SEGMENT_ATTENTION. The trees' lengths travel as a keyword of the model's forward
down to here. Where they are absent (generation, a plain forward) the model gets transformers' SDPA attention. A model
that caps its scores, which SDPA cannot, or that was loaded with eager attention, gets its own eager attention there
(EAGER_SEGMENT_ATTENTION).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from trl_fast.data.segments import TreeLengths, num_tokens
from trl_fast.parallel.engines import original_class
from trl_fast.settings.batch_layouts import AUTO, PACKED, PADDED, SHARED_PREFIX

from .attention.flash_3 import switch_off, use_flash_3
from .attention.row_attention import AttentionSpec, RowMask
from .attention.tree_attention import attend, attention_spec, fused_kernels_serve
from .loading import backbone, reads_more_than_text
from .model_changes import changes_of
from .recurrent_layers import use_recurrent_segments
from .ulysses import SequenceGroup

logger = logging.getLogger(__name__)

SEGMENT_ATTENTION = "trl_fast_segments"
EAGER_SEGMENT_ATTENTION = "trl_fast_segments_eager"
SEGMENTS = "segment attention"
# The keywords that carry the lengths, and the tokens that see each other both ways.
LENGTHS_KEYWORD, RUNS_KEYWORD = "tree_lengths", "image_runs"
# The keywords by which transformers hands a layer's window and sinks to its attention.
WINDOW_KEYWORD, SINKS_KEYWORD = "sliding_window", "s_aux"
# Text models, by their type, whose layers without a window read images from left to right: Gemma 4's masks are so.
_CAUSAL_WITHOUT_WINDOW = ("gemma4_text", "gemma4_unified_text")
# Those in which the tokens of a run see each other beyond the window too: PaliGemma 2 adds its prompt to either mask.
_WHOLE_RUNS = ("gemma2",)
_REPLACEABLE = ("sdpa", "eager", SEGMENT_ATTENTION, EAGER_SEGMENT_ATTENTION)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    tree_lengths: tuple[TreeLengths, ...] | None = None,
    image_runs: tuple[tuple[int, int], ...] = (),
    sequence_group: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention inside each tree of a row; see attention/tree_attention.py.

    Args:
        query: (1, heads, T, D); key, value: (1, key-value heads, T, D); any float dtype.
        attention_mask: ignored when tree_lengths is given.
        softcap: of the scores, as in `AttentionSpec`.
        tree_lengths: lengths of the segments of each tree in the row, summing to T; None hands over to SDPA.
        image_runs: start and end, in the row, of tokens that see each other both ways, such as those of an image.
        sequence_group: the processes that share the tokens of the row, of which T are this one's; None: it has all.
        kwargs: among them `sliding_window`, the last tokens of its sequence that a token attends to, and `s_aux`, the
            sinks (heads,) of a model that has them, as in `tree_attention`.

    Returns:
        (1, T, heads, D) and None, as transformers expects.

    Raises:
        ValueError: there is attention dropout, and branches share a prompt, scores are capped, a window is shorter
            than a sequence, or there are sinks or image runs; or a run crosses the border of a segment.
    """
    if tree_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
        )
    sinks = kwargs.get(SINKS_KEYWORD)
    if sequence_group is not None:
        query, key, value = (sequence_group.gather_tokens(states) for states in (query, key, value))
        sinks = None if sinks is None else sequence_group.own_heads(sinks)
    mask = _row_mask(module, tree_lengths, _window(module, kwargs), image_runs)
    spec = attention_spec(query, mask, scaling, softcap)
    attended = _attend_within_trees(query, key, value, spec, sinks, dropout)
    return (attended if sequence_group is None else sequence_group.scatter_tokens(attended)), None


def eager_segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree_lengths: tuple[TreeLengths, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes `segment_attention` for a model that SDPA does not serve: without lengths, its own eager attention.

    query: (1, heads, T, D); key, value: (1, key-value heads, T, D). Returns (1, T, heads, D), and weights or None.
    """
    if tree_lengths is None:
        own = sys.modules[original_class(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, **kwargs)
    return segment_attention(module, query, key, value, attention_mask, tree_lengths=tree_lengths, **kwargs)


def _row_mask(
    module: torch.nn.Module,
    trees: tuple[TreeLengths, ...],
    window: int | None,
    image_runs: tuple[tuple[int, int], ...],
) -> RowMask:
    """Returns which tokens of a row attend to which in a layer, as the masks of its family say."""
    family = getattr(getattr(module, "config", None), "model_type", None)
    if window is None and family in _CAUSAL_WITHOUT_WINDOW:
        image_runs = ()
    return RowMask(trees, window, image_runs, family in _WHOLE_RUNS)


def _window(module: torch.nn.Module, keywords: Mapping[str, Any]) -> int | None:
    """Returns how many last tokens a token attends to in a layer, itself included; None: all.

    Most layers hand it to their attention function. Where a family relies on its mask alone, all layers slide, or
    those that have the window as an attribute.
    """
    config: Any = getattr(module, "config", None)
    file_of_layer = sys.modules[original_class(module).__module__]
    window: Any = None
    if WINDOW_KEYWORD in keywords:
        window = keywords[WINDOW_KEYWORD]
    elif hasattr(module, WINDOW_KEYWORD):
        window = module.sliding_window
    elif hasattr(file_of_layer, "create_sliding_window_causal_mask") and not getattr(config, "layer_types", None):
        window = getattr(config, WINDOW_KEYWORD, None)
    return window or None


@torch.compiler.disable
def _attend_within_trees(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Computes attention (1, T, heads, Dv) within the trees of a row.

    Not compiled: how it proceeds depends on the lengths, and those are others in every batch.
    """
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for SDPA: rotary embeddings have widened queries and keys.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = spec.mask
    shares = any(len(tree) > 1 for tree in mask.trees)
    beyond_sdpa = bool(spec.softcap is not None or mask.window is not None or mask.runs or sinks is not None)
    if dropout and (shares or beyond_sdpa):
        layout, other = (AUTO, PADDED) if beyond_sdpa else (SHARED_PREFIX, PACKED)
        raise ValueError(
            f"batch_layout={layout!r} cannot be used with an attention dropout of {dropout}; use {other!r}"
        )
    if not dropout and (shares or beyond_sdpa or fused_kernels_serve(query, value, spec)):
        return attend(query, key, value, spec, sinks).transpose(1, 2).contiguous()
    lengths = [num_tokens(tree) for tree in mask.trees]
    return _sequence_by_sequence(query, key, value, lengths, spec.scale, dropout)


def _sequence_by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
AttentionInterface.register(EAGER_SEGMENT_ATTENTION, eager_segment_attention)
AttentionMaskInterface.register(EAGER_SEGMENT_ATTENTION, eager_mask)


def row_inputs(
    tree_lengths: tuple[TreeLengths, ...], like: torch.Tensor, image_runs: tuple[tuple[int, int], ...] | None = None
) -> Mapping[str, object]:
    """Returns keywords of the model's forward that make it attend within the trees of a row; like: (1, T) input ids.

    image_runs: as in `segment_attention`; None: there are none.

    A four-dimensional mask passes through transformers' mask building untouched: without it, transformers would see
    position ids that restart and build a dense T x T mask.
    """
    runs = {RUNS_KEYWORD: image_runs} if image_runs else {}
    return {LENGTHS_KEYWORD: tree_lengths, "attention_mask": torch.zeros(1, 1, 1, 1, device=like.device), **runs}


def is_replaceable(implementation: str) -> bool:
    """Returns whether segment attention stands for an attention implementation: the usual ones and all flash kinds.

    What someone who asks for flash attention wants, speed and no mask in memory, the rows have from torch's kernels.
    """
    return implementation in _REPLACEABLE or is_flash_attention_requested(
        requested_attention_implementation=implementation
    )


def _sdpa_serves(model: PreTrainedModel) -> bool:
    """Returns whether SDPA serves a model. transformers 5.17 says so of models whose caps it then ignores."""
    return model._supports_sdpa and not getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


def keep_score_caps(model: PreTrainedModel) -> None:
    """Has a model that caps its scores attend eagerly where it was loaded with SDPA, which would ignore the caps."""
    if model.config.get_text_config()._attn_implementation == "sdpa" and not _sdpa_serves(model):
        _change_attention(model, "capped scores", "attention is eager, since SDPA ignores the caps", "eager")


def use_segment_attention(model: PreTrainedModel) -> None:
    """Switches a model to `segment_attention`; without the lengths keyword it behaves as before."""
    before = model.config.get_text_config()._attn_implementation
    is_eager = before in ("eager", EAGER_SEGMENT_ATTENTION)
    name = SEGMENT_ATTENTION if _sdpa_serves(model) and not is_eager else EAGER_SEGMENT_ATTENTION
    if before not in _REPLACEABLE:
        logger.warning(
            f"attn_implementation={before!r} gives way to trl_fast's own attention, by torch's flash kernels, which "
            "keeps the sequences of a row apart."
        )
    _change_attention(model, SEGMENTS, "attention and states keep the trees of a row apart", name)


def _change_attention(model: PreTrainedModel, name: str, purpose: str, implementation: str) -> None:
    changes = changes_of(model)
    if name not in changes:
        before = model.config.get_text_config()._attn_implementation
        change = changes.get_or_add(name, purpose)
        change.on_undo(_restore_attention, model, implementation, before or "sdpa")
        if name == SEGMENTS:
            use_recurrent_segments(model, change)
            if use_flash_3(model):
                change.on_undo(switch_off)
    set_attention(model, implementation)


def _restore_attention(model: PreTrainedModel, ours: str, before: str) -> None:
    """Gives a model the attention of before back, unless another one was chosen since."""
    if model.config.get_text_config()._attn_implementation == ours:
        set_attention(model, before)


def follow_attention(model: PreTrainedModel, leader: PreTrainedModel) -> None:
    """Gives a model the attention of another one, as a reference policy needs that of its policy.

    Where that one keeps the trees of a row apart, so do this one's attention and the states of its own layers.
    """
    if SEGMENTS in changes_of(leader):
        use_segment_attention(model)
    set_attention(model, leader.config.get_text_config()._attn_implementation)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Sets the attention of a model, or of its text model where it reads images too, whose attention stays."""
    text = backbone(model) if reads_more_than_text(model) else model
    text.set_attn_implementation(implementation)
