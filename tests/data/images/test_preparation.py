"""Datasets with images become token rows for every method: formats that mean the same, and what is refused, by row."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from datasets import Dataset, List, load_from_disk
from datasets import Image as ImageFeature

from support.vision_processors import pictures, tiny_processor
from trl_fast.data.images import ImageReader
from trl_fast.data.images.columns import load_images
from trl_fast.data.preference import prepare_preference_dataset
from trl_fast.data.prompt_only import prepare_prompt_dataset
from trl_fast.data.reward_modeling import prepare_reward_dataset
from trl_fast.data.unpaired_preference import prepare_unpaired_dataset

READER = ImageReader(tiny_processor("qwen2_5_vl"))
IMAGE = READER.image_token_id
FIRST, SECOND = pictures(2, (28, 56))
SAID = [{"role": "assistant", "content": "It is blue."}]
OTHER = [{"role": "assistant", "content": "A dog."}]
PAIR = {"prompt": [{"role": "user", "content": "What is it?"}], "chosen": SAID, "rejected": OTHER}
METHODS = {
    "dpo": (prepare_preference_dataset, PAIR),
    "kto": (prepare_unpaired_dataset, {"prompt": PAIR["prompt"], "completion": SAID, "label": True}),
    "reward": (prepare_reward_dataset, PAIR),
    "grpo": (prepare_prompt_dataset, {"prompt": PAIR["prompt"]}),
}


def png(image):
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def prepare(method, rows, **options):
    how = METHODS[method][0]
    data = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    return how(data, READER.tokenizer, image_reader=READER, **options)


def in_parts(*parts, **other):
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return PAIR | {"prompt": [{"role": "user", "content": texts}]} | other


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_images_of_prompts(method):
    rows = [METHODS[method][1] | {"images": images} for images in ([FIRST], [FIRST, SECOND], [])]
    prepared = prepare(method, rows)
    column = "chosen_ids" if method == "reward" else "prompt_ids"
    assert [row[column].count(IMAGE) for row in prepared] == [2, 4, 0]
    assert [len(load_images(row)) for row in prepared] == [1, 2, 0]
    # They stay as they are stored.
    assert set(prepared[0]["images"][0]) == {"bytes", "path"}
    stream = prepare(method, Dataset.from_list(rows).to_iterable_dataset())
    assert [row[column] for row in stream] == list(prepared[column])


def test_places_that_mean_the_same_give_the_same_tokens(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(FIRST))
    stored = {"bytes": png(FIRST), "path": None}
    expected = prepare("dpo", [PAIR | {"images": [FIRST]}])[0]
    whole = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    implicit = {
        column: whole + [{"role": "assistant", "content": [{"type": "text", "text": PAIR[column][0]["content"]}]}]
        for column in ("chosen", "rejected")
    }
    for row in (
        PAIR | {"image": FIRST},
        PAIR | {"images": [str(path)]},
        PAIR | {"images": [stored]},
        in_parts({"type": "image"}, "What is it?", images=[FIRST]),
        in_parts({"type": "image", "image": stored}, "What is it?"),
        in_parts({"type": "image", "url": str(path)}, "What is it?"),
        in_parts({"type": "image_url", "image_url": {"url": str(path)}}, "What is it?"),
        implicit | {"images": [FIRST]},
    ):
        prepared = prepare("dpo", [row])[0]
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert prepared[column] == expected[column], row
        assert load_images(prepared)[0].tobytes() == FIRST.tobytes()


def test_keys_that_a_dataset_fills_with_none_count_as_missing(tmp_path):
    """Each part of a content has the keys that one of them has."""
    path = tmp_path / "a.png"
    path.write_bytes(png(FIRST))
    places = [{"type": "image", "url": str(path)}, {"type": "image", "image": {"bytes": png(SECOND), "path": None}}]
    row = Dataset.from_list([in_parts(*places, "What is it?")])[0]
    assert row["prompt"][0]["content"][0]["image"] is None and row["prompt"][0]["content"][2]["url"] is None
    prepared = prepare("dpo", [row])[0]
    assert prepared["prompt_ids"] == prepare("dpo", [PAIR | {"images": [FIRST, SECOND]}])[0]["prompt_ids"]
    assert [image.tobytes() for image in load_images(prepared)] == [FIRST.tobytes(), SECOND.tobytes()]


def test_text_marks_the_places_of_images_with_the_processors_own_token():
    row = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>Is it?", "chosen": " Yes.", "rejected": " No."}
    prepared = prepare("dpo", [row | {"images": [FIRST]}])[0]
    assert prepared["prompt_ids"].count(IMAGE) == 2
    assert READER.tokenizer.decode(prepared["chosen_ids"]) == " Yes."


@pytest.mark.parametrize("method, options", [("dpo", {}), ("kto", {"kl_batch_size": 2})])
def test_images_are_not_written_to_the_cache_again(method, options, tmp_path):
    large = pictures(1, (300, 300))[0]
    Dataset.from_list([METHODS[method][1] | {"images": [large]}] * 4).save_to_disk(tmp_path / "data")
    prepared = prepare(method, load_from_disk(tmp_path / "data"), max_length=500, **options)
    sizes = [Path(file["filename"]).stat().st_size for file in prepared.cache_files]
    assert len([size for size in sizes if size > 4 * 200_000]) == 1  # that of the dataset itself


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (
            [in_parts({"type": "image"}, "?", {"type": "image"}, images=[FIRST])],
            {},
            r"row 0: Number of images provided \(1\) does not match number of image placeholders \(2\)",
        ),
        (
            [PAIR | {"images": [png(FIRST)]}, PAIR | {"images": [png(FIRST), png(SECOND)[:900]]}],
            {},
            "row 1, image 1: the image is broken",
        ),
        ([PAIR | {"images": [b"no"]}], {}, "row 0, image 0: the image is no image that Pillow reads"),
        ([PAIR | {"images": ["none.png"]}], {}, "row 0, image 0: there is no file 'none.png'"),
        ([PAIR | {"images": [None, png(FIRST)]}], {}, "row 0, image 0: None is of type NoneType"),
        (
            [PAIR | {"images": [png(FIRST)]}],
            {"max_length": 5},
            "row 0: max_length=5 would cut 1 of the 2 image tokens",
        ),
        (
            [PAIR | {"images": [png(FIRST)]}],
            {"max_length": 50, "max_prompt_length": 9},
            "row 0: max_prompt_length=9 would cut 2 of the 2 image tokens",
        ),
        (
            [PAIR | {"images": [png(FIRST)]}],
            {"max_length": 50, "truncation_mode": "keep_end"},
            "truncation_mode='keep_end' is not supported with images",
        ),
        (
            [PAIR | {"chosen": in_parts({"type": "image", "image": png(FIRST)})["prompt"], "images": []}],
            {},
            "row 0, column 'chosen': a completion has an image; images belong to the prompt",
        ),
        (
            [in_parts({"type": "image", "image": png(FIRST)}, images=[png(FIRST)])],
            {},
            "row 0: there are 1 images in the messages and 1 in a column",
        ),
        ([PAIR | {"image": png(FIRST), "images": []}], {}, "has the columns 'image' and 'images'; remove one"),
        ([PAIR | {"images": "a.png"}], {}, "row 0, column 'images': 'a.png'; expected a list of images"),
        ([PAIR | {"image": [png(FIRST)]}], {}, "row 0, column 'image': .*; expected one image"),
    ],
)
def test_what_is_refused_is_named_by_row(rows, options, message):
    with pytest.raises(ValueError, match=f"[Tt]he train dataset,? ?{message}|^{message}") as error:
        prepare("dpo", rows, **options)
    assert "\n" not in str(error.value)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        list(prepare("dpo", stream, **options))


def test_rows_before_a_broken_one_of_a_stream_are_read():
    good, broken = PAIR | {"images": [png(FIRST)]}, PAIR | {"images": [b"no"]}
    rows = iter(prepare("dpo", Dataset.from_list([good, broken]).to_iterable_dataset()))
    assert next(rows)["prompt_ids"].count(IMAGE) == 2
    with pytest.raises(ValueError, match="The train dataset, row 1, image 0"):
        next(rows)


@pytest.mark.parametrize(
    "method, row, options, message",
    [
        ("kto", PAIR | {"label": True}, {}, "has images and pairs; .* Unpair it first"),
        ("grpo", {"prompt": "What is it?"}, {}, "row 0: the prompt is text, but the dataset has images"),
        ("grpo", METHODS["grpo"][1], {"max_prompt_length": 9}, "row 0: max_prompt_length=9 would cut 2 of the 2"),
    ],
)
def test_what_a_method_refuses(method, row, options, message):
    with pytest.raises(ValueError, match=f"The train dataset,? {message}"):
        prepare(method, [row | {"images": [FIRST]}], **options)


@pytest.mark.parametrize("method", METHODS)
def test_images_without_a_processor_are_refused(method):
    how, row = METHODS[method]
    with pytest.raises(ValueError, match="has the column 'images', but nothing reads images: give a model that does"):
        how(Dataset.from_list([row | {"images": [FIRST]}]), READER.tokenizer)
    with pytest.raises(ValueError, match="row 0, column 'prompt', message 0: .*'image', which needs an image"):
        how(Dataset.from_list([row | {"prompt": in_parts({"type": "image"})["prompt"]}]), READER.tokenizer)


@pytest.mark.parametrize("streamed", [False, True])
def test_images_are_read_in_the_mode_that_a_dataset_asks_for(streamed):
    grey = Dataset.from_list([PAIR | {"images": [FIRST]}]).cast_column("images", List(ImageFeature(mode="L")))
    prepared = prepare("dpo", grey.to_iterable_dataset() if streamed else grey)
    shown = load_images(next(iter(prepared)))[0]
    assert shown.tobytes() == FIRST.convert("L").convert("RGB").tobytes() != FIRST.tobytes()
