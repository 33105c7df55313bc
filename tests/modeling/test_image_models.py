"""Images and models: the facts that laying them out needs, and layouts that are tried out with them."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from support.models import tiny_model
from support.vision_models import tiny_vision_model
from support.vision_processors import tiny_processor
from trl_fast.data.images.reader import ImageReader
from trl_fast.modeling.image_models import image_layout, image_probes
from trl_fast.modeling.layouts import LayoutRequest, choose_layout
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.verification import verify


def build(name):
    """A model, and what its layouts are tried out on."""
    model = tiny_vision_model(name)
    attach_scoring(model)
    return model, image_probes(ImageReader(tiny_processor(name)), image_layout(model))


def chosen(model, probes):
    sequences = [[5, 6, 7, 8, *([model.config.image_token_id] * 20 if probes else ()), 9]]
    return choose_layout(model, LayoutRequest("auto", max_length=200, images=probes), sequences)


@pytest.mark.parametrize(
    ("name", "untrue"),
    [
        pytest.param("gemma3", {"sees_both_ways": False}, id="tokens of an image see each other"),
        pytest.param("qwen2_5_vl", {"positions": None}, id="positions of three axes"),
        pytest.param(
            "llava", {"sees_both_ways": True}, id="tokens of an image see those before", marks=pytest.mark.slow
        ),
    ],
)
def test_a_layout_is_tried_out_with_images(name, untrue):
    """A family of which something untrue is said runs padded, with a reason; text alone would not tell."""
    model, probes = build(name)
    assert chosen(model, probes) == ("shared_prefix", None)
    # A model that has run rows goes back to its own attention first.
    layout, reason = chosen(model, probes._replace(layout=replace(probes.layout, **untrue)))
    assert layout == "padded" and "shared_prefix scores differ" in reason
    assert chosen(model, None).name == "shared_prefix"
    assert all(weight.grad is None for weight in model.parameters())


def test_the_gradient_of_images_is_compared():
    model, probes = build("llava")
    projector = model.model.multi_modal_projector
    verdicts = []
    for detached in (False, True):
        calls = []
        # In rows of several images they get no gradient.
        projector.register_forward_hook(
            lambda _, __, out, calls=calls, cut=detached: (
                (calls.append(1), out.detach() if cut else out)[1] if len(out) > 2 else out
            )
        )
        verdicts.append(verify(model, [[5, 6, 7]], layout="padded", images=probes))
    assert verdicts[0].packed_ok and not verdicts[1].packed_ok and verdicts[1].packed_error < 1e-4


def test_workers_count_positions_without_weights():
    """The function is pickled to the workers of a DataLoader."""
    model, probes = build("qwen2_5_vl")
    sent = pickle.dumps(probes.layout)
    assert len(sent) < 20_000
    tree = probes.trees[1]
    found = pickle.loads(sent).positions(tree.prompt_ids, tree.images)
    grids = torch.cat([image.tensors["image_grid_thw"] for image in tree.images])
    ids = torch.tensor([tree.prompt_ids])
    types = (ids == model.config.image_token_id).int()
    assert torch.equal(found, model.model.get_rope_index(ids, types, image_grid_thw=grids)[0][:, 0])
    assert not torch.equal(found[0], found[1])
    text = pickle.loads(sent).positions([5, 6, 7], ())
    assert text.tolist() == [[0, 1, 2]] * 3


def test_a_model_without_an_image_token_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no image token"):
        image_layout(tiny_model())
