"""`trl-fast preview` of rows with images: one mark stands for an image's tokens, the page has small copies."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from support.vision_processors import save_tiny_vision_model
from trl_fast.cli.main import main

WORDS = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (280, 140), "red").save(tmp_path / "red.png")
    Image.new("RGB", (28, 56), "blue").save(tmp_path / "blue.png")
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected", "completion")}
    prompt = [{"role": "user", "content": "Which colors?"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"images": ["red.png", "blue.png"], "prompt": prompt, **answers}))
    return str(tmp_path / "data.jsonl")


def test_one_mark_stands_for_the_tokens_of_an_image(data, tmp_path, capsys):
    model = save_tiny_vision_model(tmp_path / "model", "mistral3")
    assert main(["preview", "sft", "--model_name_or_path", model, "--dataset_name", data, *WORDS]) == 0
    out = capsys.readouterr().out
    # Tokens that break an image's rows are its own: 2 rows of 4, 4 rows of 2.
    assert "<image 280×140, 9 tokens>[IMG_END]<image 28×56, 11 tokens>[IMG_END]Which" in out.replace("\n  ", "")
    assert "[IMG]" not in out and "completion: " in out


def test_the_place_of_a_reward_counts_tokens_where_an_image_has_positions_of_several_axes(data, tmp_path, capsys):
    model = save_tiny_vision_model(tmp_path / "model", "qwen2_5_vl")
    assert main(["preview", "reward", "--model_name_or_path", model, "--dataset_name", data, *WORDS]) == 0
    # At the last token of each.
    found = re.findall(r"positions \d+-(\d+); the reward is read at position (\d+)", capsys.readouterr().out)
    assert len(found) == 2 and all(last == read for last, read in found)


def test_the_page_shows_small_copies_at_their_places(data, tmp_path, capsys):
    model, page = save_tiny_vision_model(tmp_path / "model", "llava"), tmp_path / "page.html"
    words = ["--model_name_or_path", model, "--dataset_name", data, "--html", str(page), *WORDS]
    assert main(["preview", "dpo", *words]) == 0
    assert f"Written to {page}." in capsys.readouterr().out
    text = page.read_text()
    shown = re.findall(r"&lt;image ([^,]*), 16 tokens&gt;<img src=\"data:image/jpeg;base64,([^\"]*)\"", text)
    copies = [Image.open(io.BytesIO(base64.b64decode(content))) for _, content in shown]
    assert [size for size, _ in shown] == ["280×140", "28×56"]
    assert [copy.size for copy in copies] == [(96, 48), (28, 56)]
    assert [max(range(3), key=copy.getpixel((9, 9)).__getitem__) for copy in copies] == [0, 2]
    assert "<h2>chosen: " in text and '<span class="learned">' in text and "the prompt once" in text
    assert "http" not in text and text.count("<img") == 2
    assert main(["preview", "dpo", *words[: -len(WORDS) - 1], str(tmp_path / "no" / "page.html"), *WORDS]) == 2
    assert "there is no such folder; make it, or leave html out" in " ".join(capsys.readouterr().err.split())
