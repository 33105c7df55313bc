"""Models in which the tokens of an image see each other both ways, against transformers' own masks on padded rows."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

from support.layout_gradients import assert_as_near, assert_same
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data import Tree, packing
from trl_fast.data.images.reader import ImageReader
from trl_fast.modeling.image_models import image_layout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.selective_checkpointing import set_selective_checkpointing
from trl_fast.ops.device import device_facts, simulated_device

# Changes of text models, so that windows are shorter than an image. Gemma 3's layers all see images both ways, of
# Gemma 4's those with a window; PaliGemma sees a whole prompt so, across any window.
MODELS = {
    "gemma3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    # With keys of earlier layers, text would not read what a full layer makes of an image.
    "gemma4": {"sliding_window": 3, "use_bidirectional_attention": "vision", "num_kv_shared_layers": 0},
    "paligemma": {},
    "paligemma, 2": {"model_type": "gemma2", "sliding_window": 6},
}


@pytest.fixture(autouse=True)
def _own_products():
    """Products that sum alike on every CPU: a library's may round twice as coarsely in another layout."""
    cpu = torch.device("cpu")
    with simulated_device(replace(device_facts(cpu), own_products=True)):
        yield


def trees_of(images, token):
    """Prompts with one image, with three of which two are adjacent, and with none."""
    words = iter(range(5, 300))

    def text(count):
        return [next(words) for _ in range(count)]

    def tokens(*each):
        return [token] * sum(image.num_tokens for image in each)

    one, two, *others = images
    return [
        Tree(text(3) + tokens(one) + text(9), [text(5), text(12)], images=(one,)),
        Tree(text(2) + tokens(two) + text(4) + tokens(*others) + text(2), [text(5), text(2)], images=(two, *others)),
        Tree(text(6), [text(5), text(9)]),
    ]


def loss_and_gradients(model, trees, layout, image_layout):
    batch = packing.pack_trees(trees, layout, 2, image_layout=image_layout)
    scores = score(model, batch, outputs=("logprobs", "entropy")).tokens
    sums = scores.logprobs.new_zeros(len(batch)).index_add(0, batch.branch, scores.logprobs)
    loss = -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).sum() + 0.1 * scores.entropy.sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(name, monkeypatch):
    """In training mode; then with activation checkpointing that keeps results of attention."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    family = name.split(",")[0]
    model = tiny_vision_model(family, **MODELS[name])
    token = model.config.image_token_id
    reader = ImageReader(tiny_processor(family))
    trees = trees_of([reader.image_input(picture) for picture in pictures(4)], token)
    layout = image_layout(model)
    in_float64 = copy.deepcopy(model).double()
    for scored in (model, in_float64):
        attach_scoring(scored)
    expected = loss_and_gradients(model, trees, "padded", layout)
    check = functools.partial(assert_same, expected=expected)
    if name == "gemma4":
        # Two gradients of its vision tower are mostly rounding. (Float64 is NaN in PaliGemma 2's own attention.)
        exact = loss_and_gradients(in_float64, trees, "padded", layout)
        check = functools.partial(assert_as_near, padded=expected, exact=exact)
    use_segment_attention(model)
    for kind in ("packed", "shared_prefix"):
        check(loss_and_gradients(model, trees, kind, layout))
    model.gradient_checkpointing_enable()
    for limit in (0, 1 << 30):
        set_selective_checkpointing(model, limit, attention_always=True)
        check(loss_and_gradients(model, trees, "shared_prefix", layout))
