"""Images of plans: as many tokens as a model makes embeddings of them, and sizes that a user writes."""

import pytest

from support.models import tiny_config
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, save_tiny_vision_model, tiny_processor
from trl_fast.data.images import ImageReader
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.planned_images import num_image_embeddings, parse_image_size, planned_image

FAMILIES = [
    "qwen2_5_vl",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next", "mistral3", "smolvlm")),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_makes_as_many_embeddings_as_an_image_has_tokens(family):
    config = tiny_vision_model(family).config
    image = ImageReader(tiny_processor(family)).image_input(pictures(1, (90, 40))[0])
    assert num_image_embeddings(config, image.tensors) == image.num_tokens


def test_a_built_in_shape_needs_no_processor():
    # Patches of 16 pixels, of which four make a token.
    assert planned_image("Qwen/Qwen3-VL-4B-Instruct", model_config("qwen3-vl-4b"), (640, 320)).num_tokens == 20 * 10


def test_a_folders_processor_reads_a_picture_of_the_size(tmp_path):
    folder = save_tiny_vision_model(tmp_path, "qwen3_vl")
    image = planned_image(folder, model_config(folder), (84, 56))
    assert image.num_tokens == 6 and image.tensors["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_sizes_are_width_and_height():
    assert parse_image_size("1280x720") == parse_image_size("1280X720") == (1280, 720)
    for text in ("1280", "0x5", "720p"):
        with pytest.raises(ValueError, match=f"image_size='{text}': expected width and height in pixels, such as"):
            parse_image_size(text)


def test_a_model_of_text_alone_is_named():
    with pytest.raises(ValueError, match=r"image_size: 'mine' \(llama\) reads no images; leave it out"):
        planned_image("mine", tiny_config("llama"), (8, 8))


def test_a_model_that_drops_padding_of_images_is_named():
    said = r"image_size: 'mine' \(gemma4\) has no plan on images, since its tower drops their padding"
    with pytest.raises(ValueError, match=said):
        planned_image("mine", tiny_vision_model("gemma4").config, (56, 56))
