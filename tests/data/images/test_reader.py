"""Token ids and inputs of images are those of TRL's collators, for every family with a processor."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from datasets.fingerprint import Hasher
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from support.vision_processors import WITH_PROCESSORS, pictures, tiny_processor
from trl_fast.data.images import ImageReader
from trl_fast.data.images.joining import join_images
from trl_fast.data.images.tokenization import tokenize_prompt_with_images, tokenize_with_images

# PaliGemma's processor reads no chat messages: it puts images before the text by itself.
FAMILIES = [name for name in WITH_PROCESSORS if name != "paligemma"]
# Reads each of several images as one tile, but an image alone as several.
ONE_IMAGE_ONLY = "llava_onevision"
IMAGES = [*pictures(1, (28, 56)), *pictures(1, (70, 56), seed=1), *pictures(1, (56, 56), seed=2)]


def rows():
    """Returns rows of a dataset: one image before the text, two in places between, none."""
    text = [{"type": "text", "text": "What is"}, {"type": "image"}, {"type": "text", "text": " and "}]
    parts = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [*text, {"type": "image"}]}]
    return [
        {"images": IMAGES[:1], "prompt": [{"role": "user", "content": "What is it?"}]},
        {"images": IMAGES[1:], "prompt": parts},
        {"images": [], "prompt": [{"role": "user", "content": "Why?"}]},
    ]


def with_completions(row):
    said = {"chosen": "It is blue.", "rejected": "A dog."}
    return row | {column: [{"role": "assistant", "content": text}] for column, text in said.items()}


def unpadded(batch, row):
    kept = batch["attention_mask"][row].bool()
    ids, completion = batch["input_ids"][row][kept], batch["completion_mask"][row][kept].bool()
    return ids[~completion].tolist(), ids[completion].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_inputs_are_those_of_trl(family):
    processor = tiny_processor(family)
    reader = ImageReader(processor)
    data = [with_completions(row) for row in rows()]
    if family == ONE_IMAGE_ONLY:
        with pytest.raises(
            ValueError, match="row 1 has 2 images; LlavaOnevisionProcessor reads an image among others"
        ):
            tokenize_with_images(data[1], ("chosen",), reader, 1, "train")
        data[1] = with_completions(rows()[0])
    expected = DataCollatorForVisionPreference(processor)(deepcopy(data))
    inputs = []
    for number, row in enumerate(data):
        prompt_ids, completions = tokenize_with_images(row, ("chosen", "rejected"), reader, number, "train")
        for column, ids in enumerate(completions):
            assert (prompt_ids, ids) == unpadded(expected, number + 3 * column)
        own = reader.row_inputs(row)
        assert sum(image.num_tokens for image in own) == prompt_ids.count(reader.image_token_id)
        assert len(own) == len(row["images"]) and all(image.num_tokens for image in own)
        inputs += own
    # TRL repeats the images for the rejected completions.
    joined = join_images(inputs * 2)
    assert joined.keys() == expected.keys() - {*("input_ids", "attention_mask", "completion_mask"), *TYPES}
    for name, value in joined.items():
        theirs = expected[name].to(value.dtype)
        if family in ("idefics3", "smolvlm"):
            # One row a sample, filled up with empty tiles.
            value, theirs = (tiles.flatten(0, 1)[tiles.flatten(0, 1).flatten(1).any(1)] for tiles in (value, theirs))
        assert torch.equal(value.flatten(), theirs.flatten()), name


TYPES = ("token_type_ids", "mm_token_type_ids")


def test_pixels_are_made_once_a_size_for_token_ids(monkeypatch):
    processor = tiny_processor("qwen2_5_vl")
    made = []
    original = type(processor.image_processor).__call__
    monkeypatch.setattr(
        type(processor.image_processor), "__call__", lambda self, *a, **k: made.append(1) or original(self, *a, **k)
    )
    reader = ImageReader(processor)
    text = processor.image_token
    ids = [reader.text_ids(text, [image]) for image in pictures(3, (28, 56))]
    assert ids[0] == ids[1] == ids[2] == [reader.image_token_id] * 2 and len(made) == 1
    assert len(reader.text_ids(text, pictures(1, (56, 56)))) == 4 and len(made) == 2
    # The inputs of images are always their own, and the pixels are no part of a copy.
    inputs = [reader.image_input(image) for image in pictures(2, (28, 56))]
    assert not inputs[0].is_same(inputs[1]) and inputs[0].is_same(reader.image_input(pictures(1, (28, 56))[0]))
    assert len(pickle.dumps(reader)) == len(pickle.dumps(ImageReader(processor)))
    assert Hasher.hash(reader) == Hasher.hash(ImageReader(processor))


def test_a_prompt_with_tools_and_options_reaches_the_chat_template():
    processor = tiny_processor("qwen2_5_vl")
    processor.chat_template = "{{ tools | length }}{{ mood }}" + processor.chat_template
    reader = ImageReader(processor)
    ids = reader.prompt_ids(rows()[2]["prompt"], tools=[{"type": "function"}] * 3, mood="glad")
    assert reader.tokenizer.decode(ids).startswith("3glad") and reader.tokenizer.decode(ids).endswith("assistant\n")


def test_a_processor_that_cannot_read_images_is_named():
    processor = tiny_processor("llava")
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "image_token_ids": [None]}
    for missing, message in (
        ("image_processor", r"processing_class \(SimpleNamespace\) has no image_processor"),
        ("tokenizer", "has no tokenizer"),
        (None, "has no image token"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageReader(SimpleNamespace(**{key: value for key, value in parts.items() if key != missing}))
    processor.chat_template = None
    with pytest.raises(ValueError, match="The train dataset, row 7: .*LlavaProcessor.* has no chat template"):
        tokenize_with_images(with_completions(rows()[0]), ("chosen",), ImageReader(processor), 7, "train")


@pytest.mark.parametrize("images", [[], IMAGES[:1]])
def test_a_text_that_holds_the_token_of_a_part_of_an_image_is_named(images):
    """Gemma 3's processor counts the marks that open images, and expands those alone."""
    reader = ImageReader(tiny_processor("gemma3"))
    row = {**with_completions(rows()[0]), "images": images}
    row["prompt"] = [{"role": "user", "content": "Is <image_soft_token> a token?"}]
    message = f"row 4: the text has {1 + 4 * len(images)} image tokens, but its images have {4 * len(images)}"
    with pytest.raises(ValueError, match=message):
        tokenize_with_images(row, ("chosen", "rejected"), reader, 4, "train")
    with pytest.raises(ValueError, match=f"row 5: the text has {1 + 4 * len(images)} image tokens"):
        tokenize_prompt_with_images(row, reader, 5, "train")
    row = {**with_completions(rows()[2]), "chosen": [{"role": "assistant", "content": "<image_soft_token>"}]}
    with pytest.raises(ValueError, match="row 6: the text has 1 image tokens, but its images have 0"):
        tokenize_with_images(row, ("chosen", "rejected"), reader, 6, "train")


def test_a_processor_that_runs_out_of_images_is_named(monkeypatch):
    """Those of transformers 5.17 do not count the places for images before they fill them."""
    reader = ImageReader(tiny_processor("llava"))
    row = {**with_completions(rows()[0]), "prompt": [{"role": "user", "content": "Is <image> a token?"}]}
    monkeypatch.setattr(type(reader.processor), "__call__", lambda *args, **kwargs: next(iter([])))
    for tokenize in (tokenize_prompt_with_images, lambda *given: tokenize_with_images(given[0], (), *given[1:])):
        with pytest.raises(ValueError, match="row 4: the text has more places .* itself hold '<image>'"):
            tokenize(row, reader, 4, "train")
