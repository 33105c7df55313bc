"""Images in rollouts: read once a generation, shown in messages as TRL does, and generated from once a prompt."""

import copy

import pytest
import torch
from trl.data_utils import prepare_multimodal_messages

from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.images.reader import ImageReader
from trl_fast.modeling.image_models import image_layout
from trl_fast.rollout import RolloutImages, SamplingSettings, TransformersEngine
from trl_fast.rollout.images import with_images_in_messages
from trl_fast.rollout.transformers_engine import _say_once

TYPES = {"qwen2_5_vl": ("mm_token_type_ids",), "qwen3_vl": ("mm_token_type_ids",), "gemma3": ("token_type_ids",)}


def asked(*parts):
    return [{"role": "user", "content": [*parts]}]


def image(picture):
    return {"type": "image", "image": picture}


def text(words):
    return {"type": "text", "text": words}


def test_each_picture_is_read_once_a_generation(monkeypatch):
    first, second = pictures(2)
    images, read = RolloutImages(ImageReader(tiny_processor("llava"))), []
    original = ImageReader.image_input
    monkeypatch.setattr(ImageReader, "image_input", lambda self, picture: read.append(1) or original(self, picture))
    prompts = [asked(image(each), text("What is it?")) for each in (first, first.copy(), second)]
    found = images.of_prompts([*prompts, asked(text("Hello."), image(second)), "plain text"])
    assert found[0][0] is found[1][0] and found[2][0] is found[3][0] is not found[0][0] and found[4] == ()
    assert len(read) == 2
    images.forget()
    assert images.of_prompts(prompts)[0][0].digest == found[0][0].digest and len(read) == 4
    assert images.of_prompts([asked(text("Hello.")), "plain text"]) is None


ROWS = {
    "images": [{"images": [1, 2]}, {"images": []}, {"images": None}],
    "image": [{"image": 1}, {"image": None}, {"image": 2}],
    "no images at all": [{"images": []}, {"images": []}, {"images": []}],
    "no column": [{}, {}, {}],
}


@pytest.mark.parametrize("columns", ROWS.values(), ids=ROWS.keys())
def test_prompts_are_shown_as_in_trl(columns):
    known = dict(enumerate(pictures(3)))

    def opened(value):
        return [known[each] for each in value] if isinstance(value, list) else known.get(value)

    rows = [
        {"prompt": [{"role": "user", "content": "What is it?"}], **{name: opened(each) for name, each in row.items()}}
        for row in columns
    ]
    before = copy.copy(rows)
    shown = with_images_in_messages(rows)
    # As TRL's trainers have it.
    given = [row.get("images", [] if row.get("image") is None else [row["image"]]) for row in rows]
    expected = [row["prompt"] for row in rows]
    if any(given):
        expected = [prepare_multimodal_messages(row["prompt"], own) for row, own in zip(rows, given, strict=True)]
    assert [row["prompt"] for row in shown] == expected
    assert rows == before and [row.get("images") for row in shown] == [row.get("images") for row in rows]


def test_more_images_than_places():
    row = {"prompt": asked(text("What is it?")), "images": pictures(1)}
    with pytest.raises(ValueError, match=r"images provided \(1\) does not match number of image placeholders \(0\)"):
        with_images_in_messages([row])


FAMILIES = ["qwen2_5_vl", "gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "llava"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_images_are_computed_once_a_group(family):
    """Completions are those of `generate` on each prompt alone, and each image passes the tower once."""
    model, processor = tiny_vision_model(family), tiny_processor(family)
    reader = ImageReader(processor)
    one, other, larger = *pictures(2), *pictures(1, (84, 56), seed=7)
    messages = [
        *[asked(image(one), text("What is it?"))] * 2,
        # The same tokens with another image.
        asked(image(other), text("What is it?")),
        *[asked(text("Compare"), image(larger), text("and"), image(one))] * 2,
        asked(text("Hello.")),
    ]
    prompt_ids = [reader.prompt_ids(each) for each in messages]
    assert prompt_ids[1] == prompt_ids[2]
    images = RolloutImages(reader).of_prompts(messages)
    layout = ImageLayout(reader.image_token_id, TYPES.get(family, ()))
    engine = TransformersEngine(model, {1}, 2, image_layout=layout, suppressed=[reader.image_token_id])
    seen = []
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0].shape[0]), with_kwargs=True
    )
    settings = SamplingSettings(6, generation_kwargs={"do_sample": False, "temperature": None})
    got = engine.generate(prompt_ids, settings, images=images).completion_ids
    hook.remove()
    different = [images[0][0], images[2][0], *images[3]]
    assert seen == [sum(len(each.inputs.tensors["pixel_values"]) for each in different)]
    expected = []
    for each in messages:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = processor.apply_chat_template([each], **options)
        suppressed = {"suppress_tokens": [reader.image_token_id], "eos_token_id": 1, "pad_token_id": 2}
        row = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False, **suppressed)[0]
        completion = row[inputs["input_ids"].shape[1] :].tolist()
        expected.append(completion[: completion.index(1) + 1] if 1 in completion else completion)
    assert got == expected and len({*map(tuple, got)}) >= 3


def test_image_tokens_are_not_sampled():
    model, reader = tiny_vision_model("llava"), ImageReader(tiny_processor("llava"))
    token = reader.image_token_id
    with torch.no_grad():
        model.lm_head.weight[token] = 100 * model.lm_head.weight[token].abs()
    sampled = {}
    for suppressed in ([], [token]):
        torch.manual_seed(0)
        engine = TransformersEngine(model, {1}, 2, suppressed=suppressed)
        # What a user leaves out comes besides.
        settings = SamplingSettings(8, generation_kwargs={"suppress_tokens": [9]})
        rows = engine.generate([[5, 6, 7]] * 8, settings).completion_ids
        sampled[len(suppressed)] = sum(row.count(token) for row in rows)
    assert sampled[0] > 0 and sampled[1] == 0


def test_an_engine_without_a_layout_for_images():
    reader = ImageReader(tiny_processor("llava"))
    prompt = asked(image(pictures(1)[0]), text("What is it?"))
    engine = TransformersEngine(tiny_vision_model("llava"), {1}, 2)
    with pytest.raises(ValueError, match="the engine was made without an image_layout; give it one"):
        images = RolloutImages(reader).of_prompts([prompt])
        engine.generate([reader.prompt_ids(prompt)], SamplingSettings(2), images=images)


def test_prompts_whose_tokens_all_see_each_other_are_computed_whole(caplog):
    """PaliGemma's: the last token of a prompt is seen by those before it, so no cache holds them without it."""
    model, processor = tiny_vision_model("paligemma"), tiny_processor("paligemma")
    reader, messages = ImageReader(processor), [asked(image(pictures(1)[0]), text("What is it?"))] * 2
    images = RolloutImages(reader).of_prompts(messages)
    engine = TransformersEngine(model, {1}, 2, image_layout=image_layout(model), suppressed=[reader.image_token_id])
    settings = SamplingSettings(6, generation_kwargs={"do_sample": False, "temperature": None})
    _say_once.cache_clear()
    got = engine.generate([reader.prompt_ids(each) for each in messages], settings, images=images).completion_ids
    assert "of a prompt with images, attend to the last one" in caplog.text
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(messages[:1], **options)
    del inputs["labels"]
    suppressed = {"suppress_tokens": [reader.image_token_id], "eos_token_id": 1, "pad_token_id": 2}
    row = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False, **suppressed)[0]
    assert got == [row[inputs["input_ids"].shape[1] :].tolist()] * 2
