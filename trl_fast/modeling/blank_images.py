"""Runs what reads images on a blank one where a batch has none and other processes wait.

Engines that shard weights gather those of the image tower in all processes at once, and DDP waits for the gradients of
each. A process whose batch is text alone reads a blank image too, whose features count with weight 0: scores stay the
same bits, and the gradients of the tower are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree
from transformers import PreTrainedModel

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.parallel.gathering import is_sharded, whole_until_backward

from .loading import backbone, whole_backbone
from .model_changes import changes_of

BLANK_IMAGE = "blank image"
# Families whose class reads the embedding of the pad token from the weight, by `model_type`.
_READ_EMBEDDINGS = ("gemma4",)
_ATTRIBUTE = "trl_fast_blank_image"


def attach_blank_image(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a model what its processor makes of a blank image; tensors: keywords of its forward, of any shapes."""
    change = changes_of(model).get_or_add(BLANK_IMAGE, "batches of text alone read a blank image, if need be")
    change.set(model, _ATTRIBUTE, dict(tensors), fixed=False)


def needs_blank_image(model: PreTrainedModel, inputs: Mapping[str, object]) -> bool:
    """Returns whether other processes wait for this one's tower, should their batches have images.

    inputs: the keywords of the model's forward, with pixels only where the batch has images.
    """
    if getattr(model, _ATTRIBUTE, None) is None or "pixel_values" in inputs:
        return False
    return is_sharded(model) or (torch.is_grad_enabled() and any(w.requires_grad for w in tower_parameters(model)))


def tower_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Returns the parameters, of any shape, that read images: those beside the text model."""
    of_text = {id(weight) for weight in backbone(model).parameters()}
    return [weight for weight in whole_backbone(model).parameters() if id(weight) not in of_text]


@contextmanager
def reading_images(model: PreTrainedModel, *, blank: bool) -> Iterator[None]:
    """Has weights whole within the context that the forward of the whole class reads beside the calls of modules.

    blank: whether that forward, of text, reads the blank image too: after the embeddings of tokens, as images of a
    batch are read, so that weights are gathered in the same order.
    """
    with ExitStack() as contexts:
        if model.config.model_type in _READ_EMBEDDINGS:
            contexts.enter_context(whole_until_backward(model.get_input_embeddings()))
        if blank:
            # Before the hooks of engines, which count the text model as called from then on.
            add = partial(_add_features, model)
            hook = backbone(model).register_forward_pre_hook(add, prepend=True, with_kwargs=True)
            contexts.callback(hook.remove)
        yield


def image_features(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns what a text model reads of images, of any shapes: also what inner layers read (deepstack)."""
    inner: Any = whole_backbone(model)
    output = inner.get_image_features(**tensors, return_dict=True)
    found = [output.pooler_output, getattr(output, "deepstack_features", None)]
    return [each for each in _pytree.tree_leaves(found) if isinstance(each, torch.Tensor)]


def _add_features(
    model: PreTrainedModel, _: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]]:
    embeddings = kwargs["inputs_embeds"]
    blank: dict[str, torch.Tensor] = getattr(model, _ATTRIBUTE)
    moved = {name: copy_to_device(tensor, embeddings.device) for name, tensor in blank.items()}
    features = image_features(model, moved)
    # Weighted one by one: a sum might overflow, and infinity has no weight 0.
    nothing = torch.stack([(each * 0).sum() for each in features]).sum()
    return args, {**kwargs, "inputs_embeds": embeddings + nothing.to(embeddings.dtype)}
