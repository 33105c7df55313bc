"""Images in rows of trees: loss and every gradient, the tower's too, against padded rows; those against the family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from support import image_trees
from support.layout_gradients import assert_same, loss_and_gradients
from support.vision_models import tiny_vision_model
from support.vision_processors import WITH_PROCESSORS, pictures, tiny_processor
from trl_fast.data import Tree, pack_trees
from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.reader import ImageReader
from trl_fast.modeling.image_models import image_layout
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.selective_checkpointing import Budget, set_selective_checkpointing
from trl_fast.modeling.unread_parts import FROZEN_READERS, run_frozen_readers_without_graph

BY_DEFAULT = ("gemma3", "qwen3_vl")
FAMILIES = [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in WITH_PROCESSORS]
# Gemma 4's larger models let the tokens of an image see each other, its smaller ones do not.
CHANGES = {"gemma4": {"use_bidirectional_attention": "vision"}}
# The tokens of an image depend on how many there are in a prompt.
PROMPTS = {"llava_onevision": (image_trees.PROMPTS[0], ("The sky?", ((90, 56),)), image_trees.PROMPTS[2])}
# Its processor takes no prompt without an image.
PROMPTS["paligemma"] = image_trees.PROMPTS[:2]
SIZES = ((90, 56), (56, 56), (30, 60))


def build(name):
    model = tiny_vision_model(name, **CHANGES.get(name, {}))
    attach_scoring(model)
    return model, image_layout(model)


def trees_of(name):
    return image_trees.image_trees(tiny_processor(name), PROMPTS.get(name, image_trees.PROMPTS))


def read_from(gradients):
    """How many parameters of the tower have a gradient."""
    return sum("vision" in name or "visual" in name for name in gradients[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient(name):
    model, layout = build(name)
    expected = loss_and_gradients(model, trees_of(name), "padded", image_layout=layout)
    assert read_from(expected) > 5
    use_segment_attention(model)
    for rows in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees_of(name), rows, image_layout=layout), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_scores_are_the_familys_own(name):
    """It makes positions and types of tokens itself, of what its processor gives of images of several sizes."""
    model, layout = build(name)
    processor = tiny_processor(name)
    reader = ImageReader(tiny_processor(name))
    images = [pictures(1, size, seed)[0] for seed, size in enumerate(SIZES)]
    images = images[: 1 if name == "llava_onevision" else None]
    messages = image_trees.question("What color?", images)
    own = processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    ids = own["input_ids"][0].tolist()
    # The last token stays out of what the family reads: PaliGemma would take it for a part of the prompt.
    own = {key: each[:, :-1] if each.shape == (1, len(ids)) else each for key, each in own.items()}
    tree = Tree(ids[:-1], [ids[-1:]], tuple(map(reader.image_input, images)))
    batch = pack_trees([tree], "padded", 2, image_layout=layout)
    with torch.no_grad():
        logprobs = model(**own).logits[0].log_softmax(-1)
        found = score(model, batch).tokens.logprobs
    torch.testing.assert_close(found, logprobs[-1:].gather(1, batch.targets[:, None])[:, 0], atol=2e-5, rtol=0)


def test_images_of_patches_with_masks():
    """LFM2-VL: its processor, which needs torchvision, gives patches, how many of them count, and their shapes."""
    model, layout = build("lfm2_vl")
    trees = []
    for number, (height, width) in enumerate(((4, 4), (2, 6))):
        count = height * width
        patches = torch.zeros(1, 20, model.config.vision_config.patch_size**2 * 3)
        patches[0, :count] = torch.randn(count, patches.shape[2], generator=torch.Generator().manual_seed(number))
        tensors = {"pixel_values": patches, "spatial_shapes": torch.tensor([[height, width]])}
        tensors["pixel_attention_mask"] = (torch.arange(20) < count).long()[None]
        prompt = [*range(5, 20), *[layout.image_token_id] * (count // 4), 21, 22]
        trees.append(Tree(prompt, [[23, 24, 1], [25, 1]], (ImageInput(tensors, count // 4),)))
    expected = loss_and_gradients(model, trees, "padded", image_layout=layout)
    assert read_from(expected) > 5
    use_segment_attention(model)
    assert_same(loss_and_gradients(model, trees, "shared_prefix", image_layout=layout), expected)


@pytest.mark.parametrize("trains_tower", [True, False], ids=["tower trains", "tower frozen"])
def test_adapters_with_checkpointing(trains_tower):
    """A frozen tower has no graph, although transformers asks for a gradient of its patches."""
    name = "gemma3"
    model, layout = build(name)
    where = r".*(q_proj|v_proj)" if trains_tower else r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(model, LoraConfig(target_modules=where, init_lora_weights=False))
    trees = trees_of(name)
    expected = loss_and_gradients(model, trees, "padded", image_layout=layout)
    assert bool(read_from(expected)) == trains_tower
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    inner = base_model(model)
    set_selective_checkpointing(inner, 2**20)
    run_frozen_readers_without_graph(inner)
    use_segment_attention(inner)
    graphs = []
    inner.model.vision_tower.register_forward_hook(
        lambda _, __, output: graphs.append(output.last_hidden_state.requires_grad)
    )
    assert_same(loss_and_gradients(model, trees, "shared_prefix", image_layout=layout), expected)
    changes_of(inner).undo(FROZEN_READERS)
    assert_same(loss_and_gradients(model, trees, "shared_prefix", image_layout=layout), expected)
    assert graphs == [trains_tower, True]


def test_what_a_tower_keeps_counts_for_the_limit(monkeypatch):
    """It reads before the text's layers begin, in the room that a pass over text alone left."""
    name, limit = "llava", 2_000_000
    model, layout = build(name)
    set_selective_checkpointing(model, limit)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept, take, give_back = [], Budget.take, Budget.give_back

    def taking(self, kind, size):
        fits = take(self, kind, size)
        kept.append(size * fits)
        return fits

    def giving_back(self, size):
        kept.append(-size)
        give_back(self, size)

    monkeypatch.setattr(Budget, "take", taking)
    monkeypatch.setattr(Budget, "give_back", giving_back)
    loss_and_gradients(model, [Tree([5, 6, 7], [[8, 9]])], "padded", image_layout=layout)
    assert 0 < sum(kept) < limit // 2
    kept.clear()
    trees = trees_of(name)
    loss_and_gradients(model, trees * 4, "padded", image_layout=layout)
    assert limit // 2 < sum(kept) <= limit
