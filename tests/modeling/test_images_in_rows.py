"""Images in rows of trees: loss and every gradient, the tower's too, against padded rows; those against the family."""

from __future__ import annotations

import pytest
import torch

from support import image_trees
from support.layout_gradients import assert_same, loss_and_gradients
from support.vision_models import tiny_vision_model
from support.vision_processors import WITH_PROCESSORS, pictures, tiny_processor
from trl_fast.data import Tree, pack_trees
from trl_fast.data.images.reader import ImageReader
from trl_fast.modeling.image_models import image_layout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention

BY_DEFAULT = ("gemma3", "llava", "qwen2_5_vl", "qwen3_vl")
TRAINED = [name for name in WITH_PROCESSORS if name != "paligemma"]
FAMILIES = [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in TRAINED]
# Gemma 4's larger models let the tokens of an image see each other, its smaller ones do not.
CHANGES = {"gemma4": {"use_bidirectional_attention": "vision"}}
# The tokens of an image depend on how many there are in a prompt.
PROMPTS = {"llava_onevision": (image_trees.PROMPTS[0], ("The sky?", ((90, 56),)), image_trees.PROMPTS[2])}


def build(name):
    model = tiny_vision_model(name, **CHANGES.get(name, {}))
    attach_scoring(model)
    return model, image_layout(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient(name):
    model, layout = build(name)
    trees = image_trees.image_trees(tiny_processor(name), PROMPTS.get(name, image_trees.PROMPTS))
    expected = loss_and_gradients(model, trees, "padded", image_layout=layout)
    assert any("vision" in each or "visual" in each for each in expected[1])
    use_segment_attention(model)
    for rows in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, rows, image_layout=layout), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_scores_are_the_familys_own(name):
    """It makes positions and types of tokens itself, of what its processor gives of all images together."""
    model, layout = build(name)
    processor = tiny_processor(name)
    reader = ImageReader(processor)
    messages = image_trees.question("What color?", pictures(1 if name in PROMPTS else 2, (90, 56)))
    own = reader.conversation(messages, return_tensors="pt")
    ids = own["input_ids"][0].tolist()
    batch = pack_trees([Tree([], [ids], reader.image_inputs(messages))], "padded", 2, image_layout=layout)
    with torch.no_grad():
        logprobs = model(**own).logits[0].log_softmax(-1)
        found = score(model, batch).tokens.logprobs
    torch.testing.assert_close(found, logprobs[:-1].gather(1, batch.targets[:, None])[:, 0], atol=2e-5, rtol=0)
