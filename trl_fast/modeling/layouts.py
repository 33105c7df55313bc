"""Chooses a batch layout: what each layout needs of a model and of a method, and which is the best that serves both.

The layouts themselves are listed in `settings.batch_layouts`. What a layout needs follows from how it is described
there: one row needs attention that keeps its sequences apart, shared prompts need a method that has them. A model's
declarations are read first, then its numbers are compared on a few short sequences.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from trl_fast.parallel.agreement import decided_by_first
from trl_fast.parallel.engines import original_class
from trl_fast.parallel.gathering import is_sharded
from trl_fast.settings.batch_layouts import AUTO, BATCH_LAYOUTS, PADDED, BatchLayout, layouts_for

from .classifier_head import HEAD, has_classifier_head
from .layer_kinds import UNKNOWN, LayerKind, layer_kinds, mixers_of, recurrent_mixer
from .model_changes import changes_of
from .recurrent_layers import RECURRENT_LAYERS
from .scoring import give_up_fused_head
from .segment_attention import SEGMENTS, is_replaceable, set_attention, use_segment_attention
from .verification import ImageProbes, Verdict, head_reads_states, verify, verify_rewards

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 12


@dataclass(frozen=True)
class LayoutRequest:
    """Describes what a method asks of a layout.

    - `asked`: the argument `batch_layout`, "auto" or a layout's name.
    - `method`: the method's name, for messages.
    - `shares_prompts`: whether rows hold several completions of one prompt.
    - `max_length`: tokens of the longest sequence, None where there is no limit.
    - `without_dropout`: whether dropout is switched off for training.
    - `pads_because`: why rows of several sequences are refused whatever the model, None if they are not.
    - `images`: what rows with images are tried out on; None where there are no images.
    """

    asked: str
    method: str = ""
    shares_prompts: bool = True
    max_length: int | None = None
    without_dropout: bool = True
    pads_because: str | None = None
    images: ImageProbes | None = None


class Readout(NamedTuple):
    """Describes what is read of a model: whether it declares to give it of packed rows, and a comparison of numbers.

    - `supports_packed`: from a model and max_length to whether it does, and why not.
    - `verify`: from a model, sequences, a layout and probes of images to a Verdict.
    - `has_head`: whether a language-modelling head is read.
    """

    supports_packed: Callable[[PreTrainedModel, int | None], tuple[bool, str]]
    verify: Callable[..., Verdict]
    has_head: bool = False


class ChosenLayout(NamedTuple):
    """Holds a batch layout's name, and why the method's best one is not it; None where it is."""

    name: str
    reason: str | None = None


def choose_layout(
    model: PreTrainedModel, request: LayoutRequest, sequences: list[list[int]], readout: Readout | None = None
) -> ChosenLayout:
    """Returns the best batch layout for a model, tried out on the beginnings of some sequences.

    A layout that is not the method's best is logged with the reason. The model may be changed: rows without padding
    leave it with segment attention, and a fused head whose scores are not the model's own is given up.

    readout: what is read of the model, TOKEN_SCORES if None.

    Raises:
        ValueError: the layout that was asked for cannot be.
    """
    readout = readout or TOKEN_SCORES
    probes = _probes(sequences, request.images)
    layout, refused, verdict = _best_layout(model, request, readout, probes)
    verdict = verdict or _try_out(model, readout, probes, None, request.images)
    if not verdict.fused_ok:
        give_up_fused_head(model, verdict.head_mismatch())
    _check_asked(request, layout, refused)
    best = layouts_for(shares_prompts=request.shares_prompts)[0]
    if layout == best:
        return ChosenLayout(layout)
    if request.asked != AUTO:
        return ChosenLayout(layout, f"batch_layout={request.asked!r} asks for it")
    logger.warning(f"batch_layout: using {layout!r}, because {refused[best]}.")
    return ChosenLayout(layout, refused[best])


def choose_layout_or_pad(
    model: PreTrainedModel, request: LayoutRequest, sequences: list[list[int]], readout: Readout | None = None
) -> str:
    """Returns the best batch layout for a model beside the trained one, such as a reward model.

    Unlike `choose_layout`, a layout that cannot be is no error: the model is then run on padded rows.

    readout: what is read of the model, REWARDS if None.
    """
    layout, _, _ = _best_layout(model, request, readout or REWARDS, _probes(sequences, request.images))
    if layout == PADDED != request.asked:
        logger.warning(f"batch_layout: {type(model).__name__} is run on padded rows, since it cannot run packed ones.")
    return layout


def declared_layout(model: PreTrainedModel, request: LayoutRequest, readout: Readout | None = None) -> str:
    """Returns the layout that `choose_layout` takes if the model keeps what it declares. Nothing is run or changed.

    Raises:
        ValueError: the layout that was asked for cannot be.
    """
    layout, refused, _ = _best_layout(model, request, readout or TOKEN_SCORES, None)
    _check_asked(request, layout, refused)
    return layout


def refusal(
    layout: BatchLayout, model: PreTrainedModel, request: LayoutRequest, readout: Readout | None = None
) -> str | None:
    """Returns why a layout cannot be, by what model and method declare; None if it can."""
    if layout.pads:
        return None
    if request.pads_because is not None:
        return request.pads_because
    packs, reason = (readout or TOKEN_SCORES).supports_packed(model, request.max_length)
    if not packs:
        return reason
    if layout.shares_prompts and not request.shares_prompts:
        return f"{request.method} has no prompts that several completions share"
    return None if request.without_dropout else _dropout_refusal(model, layout, request)


def _dropout_refusal(model: PreTrainedModel, layout: BatchLayout, request: LayoutRequest) -> str | None:
    """Returns why a layout cannot be with the attention dropout that is left on; None if it can."""
    config = model.config.get_text_config()
    dropout = max(getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attn_pdrop"))
    beyond_sdpa = any(kind.softcap or kind.window or kind.sinks for kind in layer_kinds(model))
    if dropout and (layout.shares_prompts or beyond_sdpa):
        return f"{type(model).__name__} has an attention dropout of {dropout}, which the attention of rows lacks"
    return None


def _best_layout(
    model: PreTrainedModel, request: LayoutRequest, readout: Readout, probes: list[list[int]] | None
) -> tuple[str, dict[str, str], Verdict | None]:
    """Returns the first layout that serves, why the others do not, and the verdict of the last one tried out.

    probes: sequences to try layouts out on; None takes declarations for the truth.
    """
    refused, verdict = {}, None
    changes = changes_of(model)
    had_segments, before = SEGMENTS in changes, model.config.get_text_config()._attn_implementation
    for name, layout in BATCH_LAYOUTS.items():
        reason = refusal(layout, model, request, readout)
        if reason is not None:
            refused[name] = reason
        # A padded row needs no attention of ours, and is what is left where nothing else serves.
        elif layout.pads or (request.asked in (AUTO, name) and probes is None):
            return name, refused, verdict
        elif request.asked in (AUTO, name):
            use_segment_attention(model)
            verdict = _try_out(model, readout, probes, name, request.images)
            if verdict.packed_ok:
                return name, refused, verdict
            refused[name] = verdict.mismatch(name)
            if had_segments:
                set_attention(model, before or "sdpa")
            else:
                changes.undo(SEGMENTS)
    raise AssertionError("the last layout serves every model")


def _probes(sequences: list[list[int]], images: ImageProbes | None) -> list[list[int]]:
    """Returns the text at the beginnings of sequences, on which a layout is tried out."""
    if images is not None:
        sequences = [[token for token in ids if token != images.layout.image_token_id] for ids in sequences]
    return [ids[:_PROBE_TOKENS] for ids in sequences if len(ids) > 1] or [[0, 1, 2], [2, 1, 0]]


def _try_out(
    model: PreTrainedModel,
    readout: Readout,
    probes: list[list[int]] | None,
    layout: str | None,
    images: ImageProbes | None,
) -> Verdict:
    """Returns the verdict on a layout, in all processes that of the first one: others may lack the weights."""
    collective = is_sharded(model)
    if readout.has_head and not decided_by_first(lambda: head_reads_states(model), collective=collective):
        give_up_fused_head(model, "its head does not read what its layers give, but a projection of it")
    return decided_by_first(lambda: readout.verify(model, probes, layout=layout, images=images), collective=collective)


def _check_asked(request: LayoutRequest, layout: str, refused: dict[str, str]) -> None:
    if request.asked not in (AUTO, layout):
        reason = refused[request.asked]
        raise ValueError(f"batch_layout={request.asked!r} cannot be used: {reason}; use 'auto' or {PADDED!r}")


def supports_packed(model: PreTrainedModel, max_length: int | None) -> tuple[bool, str]:
    """Returns whether a model's architecture can run packed rows through `segment_attention`, and why not.

    Declarations are read here; `verification.verify` then compares numbers, for what no declaration tells.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    kinds = layer_kinds(model)
    for kind in kinds:
        reason = _layer_refusal(kind, max_length)
        if reason is not None:
            return False, f"{name} {reason}"
    if getattr(model, "_is_stateful", False) and not any(kind.is_recurrent for kind in kinds):
        return False, f"{name} carries a state from token to token in a way that is not known"
    if getattr(config, "alibi", False):
        return False, f"{name} has ALiBi position biases"
    if not _takes_attention_functions(model):
        return False, f"{name} does not take its attention function from transformers' AttentionInterface"
    if not is_replaceable(config._attn_implementation):
        return False, f"attn_implementation={config._attn_implementation!r} was chosen, which takes no segments"
    return True, "every layer keeps the sequences of a row apart"


def _takes_attention_functions(model: PreTrainedModel) -> bool:
    """Returns whether a model's attention is the function that is registered under a name.

    transformers does not declare it of all models that do it: the files of their modules tell.
    """
    return getattr(model, "_supports_attention_backend", False) or all(
        recurrent_mixer(module) or hasattr(sys.modules[original_class(module).__module__], "ALL_ATTENTION_FUNCTIONS")
        for module in mixers_of(model)
    )


def _layer_refusal(kind: LayerKind, max_length: int | None) -> str | None:
    """Returns why a layer cannot run rows of several sequences of at most max_length tokens; None if it can."""

    def is_exceeded(limit: int | None) -> bool:
        return limit is not None and (max_length is None or limit < max_length)

    if kind.mixer == UNKNOWN:
        return f"has layers of another kind than is known: {kind.name}"
    if kind.is_recurrent and kind.name not in RECURRENT_LAYERS:
        return f"carries a state from token to token, which would run on to the next sequence: {kind.mixer}"
    if is_exceeded(kind.chunk):
        return f"has chunks of {kind.chunk} tokens, shorter than max_length={max_length}"
    return None


def supports_packed_rewards(model: PreTrainedModel, max_length: int | None) -> tuple[bool, str]:
    """Returns whether a model's architecture gives rewards of packed rows, and why not."""
    if not has_classifier_head(model):
        return False, f"{type(model).__name__} has no head {HEAD!r} that reads the last token alone"
    return supports_packed(model, max_length)


TOKEN_SCORES = Readout(supports_packed, verify, has_head=True)
REWARDS = Readout(supports_packed_rewards, verify_rewards)
