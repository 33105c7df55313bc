"""Sets aside what text does not reach in a model that reads images or sound too.

No gradient ever comes there. Frozen, these parts need no place in an optimizer's state, and distributed training does
not wait for their gradients; what is trained is the same. Where a dataset has images, these parts train like the
others, unless they came frozen: then they run without a graph.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree
from transformers import PreTrainedModel

from .blank_images import image_features, tower_parameters
from .classifier_head import HEAD, has_classifier_head
from .loading import backbone, reads_more_than_text, whole_backbone
from .model_changes import changes_of, unbound_forward
from .scoring import evaluating

logger = logging.getLogger(__name__)

FROZEN_PARTS = "frozen parts"
PRESENT_LAYERS = "present layers"
FROZEN_READERS = "frozen readers of images"


def freeze_unread_parts(model: PreTrainedModel) -> None:
    """Freezes the parameters outside of a model's text model and head, adapters' too, and says how many they are."""
    if not reads_more_than_text(model) or FROZEN_PARTS in changes_of(model):
        return
    read = {id(parameter) for part in _read_parts(model) for parameter in part.parameters()}
    unread = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in read]
    if not unread:
        return
    change = changes_of(model).get_or_add(FROZEN_PARTS, "what text does not reach has no gradient")
    change.on_undo(_unfreeze, unread)
    for weight in unread:
        weight.requires_grad_(False)
    logger.warning(
        f"{type(model).__name__} is trained on text: the {sum(weight.numel() for weight in unread):,} parameters that "
        "read images or sound stay as they are."
    )


def freeze_unreached_weights(model: PreTrainedModel, images: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Freezes the parameters that no image reaches, for whose gradients DDP would wait: LLaVA skips its last layer.

    They never have a gradient, so what is trained is the same.

    images: of each image the keywords of the model's forward, of any shapes.
    """
    weights = [weight for weight in tower_parameters(model) if weight.requires_grad]
    if not weights:
        return
    device = weights[0].device
    given = [{name: tensor.to(device) for name, tensor in image.items()} for image in images]
    with evaluating(model), torch.enable_grad():
        features = [each.float().sum() for image in given for each in image_features(model, image)]
        found = torch.autograd.grad(torch.stack(features).sum(), weights, allow_unused=True)
    unreached = [weight for weight, gradient in zip(weights, found, strict=True) if gradient is None]
    if unreached:
        change = changes_of(model).get_or_add(FROZEN_PARTS, "what images do not reach has no gradient")
        change.on_undo(_unfreeze, unreached)
        for weight in unreached:
            weight.requires_grad_(False)


def run_frozen_readers_without_graph(model: PreTrainedModel) -> None:
    """Has the parts that read images run without gradient wherever nothing in them or before them trains.

    Adapters on the text model make transformers ask for a gradient of every embedding, those of a frozen tower's
    patches too; the tower would keep its activations, and be computed again and backward, for nothing.
    """
    if not reads_more_than_text(model) or FROZEN_READERS in changes_of(model):
        return
    change = changes_of(model).get_or_add(FROZEN_READERS, "what reads images runs without gradient where it is frozen")
    text = backbone(model)
    for part in whole_backbone(model).children():
        if not any(module is text for module in part.modules()):
            change.set(part, "forward", types.MethodType(_without_graph_if_frozen(unbound_forward(part)), part))


def _without_graph_if_frozen(forward: Any) -> Any:
    """Returns a forward that has a graph only if its module's parameters or its inputs need gradients."""

    @functools.wraps(forward)
    def run(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        inputs = (each for each in _pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor))
        trains = any(each.requires_grad for each in (*self.parameters(), *inputs))
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)

    return run


def name_present_layers(model: PreTrainedModel) -> None:
    """Has FSDP wrap only the kinds of layers that a model has: Gemma 4 names those of sound, which many lack."""
    present = {type(module).__name__ for module in model.modules()}
    named = set(model._no_split_modules or ())
    if named - present and named & present:
        change = changes_of(model).get_or_add(PRESENT_LAYERS, "FSDP is told no kinds of layers that are not there")
        change.set(model, "_no_split_modules", sorted(named & present))


def _read_parts(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    yield backbone(model)
    head = getattr(model, HEAD) if has_classifier_head(model) else model.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        yield head


def _unfreeze(weights: list[torch.nn.Parameter]) -> None:
    for weight in weights:
        weight.requires_grad_(True)
