"""NEFTune's noise: the paper's bound for a sequence of the micro-batch, in every layout."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from support.models import tiny_model
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.images.reader import ImageReader
from trl_fast.data.packing import pack_trees
from trl_fast.data.token_trees import Tree
from trl_fast.modeling.embedding_noise import SequenceNoise
from trl_fast.modeling.image_models import image_layout
from trl_fast.modeling.loading import backbone, base_model
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention

ALPHA = 5.0
# The longest sequence is the second prompt with its longer completion: 20 + 14 tokens.
TREES = [Tree([1] * 10, [[2] * 4, [3] * 9]), Tree([4] * 20, [[5] * 14, [6] * 3])]
LONGEST = 34


def noise_of(model, layout, trees=TREES, image_layout=None):
    """Returns the largest noise in the embeddings of the trees' text, and the hidden size."""
    inner = base_model(model)
    seen = {}
    weight = inner.get_input_embeddings().weight
    hook = (
        backbone(inner)
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(hidden=(args[0] if args else kwargs["hidden_states"]).detach()),
            with_kwargs=True,
        )
    )
    batch = pack_trees(trees, layout, 0, image_layout=image_layout)
    with torch.no_grad():
        score(model, batch)
    hook.remove()
    noise = (seen["hidden"] - weight.detach()[batch.input_ids]).abs().amax(-1)
    is_image = batch.input_ids == (-1 if image_layout is None else image_layout.image_token_id)
    return noise.masked_fill(is_image, 0.0).max().item(), weight.shape[1]


@pytest.fixture(params=[False, True], ids=["", "lora"])
def model(request):
    model = tiny_model()
    attach_scoring(model)
    use_segment_attention(model)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if request.param else model


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_bound_is_that_of_a_sequence(model, layout):
    model.train()
    noise = SequenceNoise(model, lambda: ALPHA)
    largest, hidden_size = noise_of(model, layout)
    bound = ALPHA / (LONGEST * hidden_size) ** 0.5
    assert 0.98 * bound < largest <= bound
    model.eval()
    assert noise_of(model, layout)[0] == 0
    model.train()
    noise.remove()
    assert noise_of(model, layout)[0] == 0


def test_trees_of_trees_and_images_have_the_bound_of_their_longest_sequence():
    """Whatever batch came before: of rows with images the embeddings are made above the text model."""
    model = tiny_vision_model("llava").train()
    attach_scoring(model)
    use_segment_attention(model)
    reader, images = ImageReader(tiny_processor("llava")), image_layout(model)
    image = reader.image_input(pictures(1)[0])
    prompt = [images.image_token_id] * image.num_tokens
    nested = [Tree([1] * 40, [Tree([2] * 30, [[3] * 4, [5] * 5]), [6] * 3])]
    SequenceNoise(model, lambda: ALPHA)
    for trees, longest in (
        (nested, 75),
        ([Tree([7] * 20 + prompt, [[8] * 9, [9] * 3], images=(image,))], 29 + image.num_tokens),
        (TREES, LONGEST),
    ):
        largest, hidden_size = noise_of(model, "shared_prefix", trees, images)
        bound = ALPHA / (longest * hidden_size) ** 0.5
        assert 0.97 * bound < largest <= 1.0001 * bound


def test_alpha_may_change(model):
    alpha = ALPHA
    model.train()
    SequenceNoise(model, lambda: alpha)
    before = noise_of(model, "shared_prefix")[0]
    alpha = 2 * ALPHA
    assert noise_of(model, "shared_prefix")[0] == pytest.approx(2 * before, rel=0.05)


def test_one_sequence_gets_the_noise_of_transformers():
    model = tiny_model().train()
    ids = torch.arange(1, 20)[None]

    def logits():
        torch.manual_seed(3)
        return model(input_ids=ids).logits

    theirs = activate_neftune(model, ALPHA)
    expected = logits()
    deactivate_neftune(model, theirs)
    noise = SequenceNoise(model, lambda: ALPHA)
    assert torch.equal(logits(), expected)
    noise.remove()
    assert not torch.equal(logits(), expected)
