"""Data files with images: paths are found from the file's folder, those that are not there are named by row."""

import json

import pytest

from support.vision_processors import pictures, save_tiny_vision_model
from trl_fast.cli.datasets import _load
from trl_fast.cli.main import main


@pytest.fixture
def data(tmp_path):
    (tmp_path / "shown").mkdir()
    for number, picture in enumerate(pictures(2)):
        picture.save(tmp_path / "shown" / f"{number}.png")
    return tmp_path / "data.jsonl"


def pair(**row):
    said = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": "What is it?"}], **said, **row}


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("streaming", [False, True])
def test_relative_paths_begin_in_the_files_folder(data, streaming):
    part = {"type": "image", "image": "shown/1.png"}
    write(data, {"images": ["shown/0.png"], "prompt": [{"role": "user", "content": [part]}]})
    (row,) = _load(str(data), "dataset_name", split="train", streaming=streaming)
    assert row["images"] == [str(data.parent / "shown" / "0.png")]
    assert row["prompt"][0]["content"][0]["image"] == str(data.parent / "shown" / "1.png")


def test_text_is_left_alone(data):
    write(data, {"images": ["data:image/png;base64,AAAA", "gone.png"], "prompt": "shown/0.png"})
    (row,) = _load(str(data), "dataset_name", split="train", streaming=False)
    assert row == {"images": ["data:image/png;base64,AAAA", "gone.png"], "prompt": "shown/0.png"}


def test_a_missing_image_is_named_by_file_and_row(data, tmp_path, capsys):
    write(data, pair(images=["shown/0.png"]), pair(images=["shown/7.png"]))
    model = save_tiny_vision_model(tmp_path / "model", "llava")
    assert main(["preview", "dpo", "--model_name_or_path", model, "--dataset_name", str(data)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{data}: The train dataset, row 1, image 0: there is no file 'shown/7.png'" in error
