"""`validate` on data with images: broken and misplaced ones by row, sizes, and rows that only images tell apart."""

from __future__ import annotations

from io import BytesIO

import pytest
from datasets import Dataset
from rich.console import Console

from support.vision_processors import pictures, tiny_processor
from trl_fast.data import validate

FIRST, SECOND = pictures(1, (28, 56))[0], pictures(1, (56, 84), seed=1)[0].convert("L")


def png(image):
    content = BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def pair(*images, prompt="What is it?", chosen="It is blue."):
    said = {"chosen": chosen, "rejected": "A dog."}
    completions = {column: [{"role": "assistant", "content": text}] for column, text in said.items()}
    return {"images": [*images], "prompt": [{"role": "user", "content": prompt}], **completions}


def codes(report):
    return {finding.kind.code: (list(finding.row_numbers), finding.detail) for finding in report.findings}


def test_rows_that_only_images_tell_apart_are_no_repetitions():
    report = validate(Dataset.from_list([pair(png(FIRST)), pair(png(SECOND)), pair(png(FIRST)), pair()]))
    found = codes(report)
    assert found["repeated_row"][0] == [2] and "repeated_prompt" not in found and not report.failed()
    facts = report.to_dict()["splits"]["train"]["images"]
    assert facts == {
        **{"rows": 3, "images": 3, "width": [28, 28, 56], "height": [56, 56, 84]},
        "modes": {"RGB": 2, "L": 1},
    }
    console = Console(record=True, width=120)
    console.print(report.images_table())
    assert "28 / 28 / 56" in console.export_text() and validate(Dataset.from_list([pair()])).images_table() is None


def test_broken_and_misplaced_images_are_found_by_row():
    two_places = [{"type": "image"}, {"type": "image"}]
    rows = [pair(png(FIRST), {"bytes": b"no", "path": None}), pair(png(FIRST)), pair(png(FIRST))]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": two_places[: len(row["images"])]}]
    rows[2]["prompt"] = [{"role": "user", "content": two_places}]
    found = codes(validate(Dataset.from_list(rows)))
    assert found["broken_image"][0] == [0] and found["broken_image"][1].startswith("image 1: the image is no image")
    assert found["misplaced_images"][0] == [2] and "images provided (1) does not match" in found["misplaced_images"][1]


def test_tokens_of_images_count_with_a_processor():
    rows = [pair(png(FIRST)), pair(png(FIRST), png(SECOND))]
    processor = tiny_processor("qwen2_5_vl")
    report = validate(Dataset.from_list(rows), processor, max_length=10)
    assert codes(report)["image_cut_at_max_length"] == ([1], "4 of 8 image tokens cut")
    assert report.to_dict()["splits"]["train"]["lengths"]["prompt"]["percentiles"]["100"] == 28
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert codes(validate(stream, processor, max_length=10)) == codes(report)
    with pytest.raises(ValueError, match="The dataset has images: give the model's processor as tokenizer, or None"):
        validate(Dataset.from_list(rows), processor.tokenizer)
