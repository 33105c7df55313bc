"""Tests what becomes of the images that a dataset holds: kinds of sources, modes, and broken ones."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from trl_fast.data.images import load_image, loading

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


CONTENT = file_of(IMAGE)


def test_every_source_gives_the_same_pixels(tmp_path):
    content, path = CONTENT, tmp_path / "a.png"
    path.write_bytes(content)
    encoded = base64.b64encode(content).decode()
    sources = [IMAGE, content, path, str(path), {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    sources += [f"data:image/png;base64,{encoded}", encoded, PIXELS]
    sources += [f"{encoded[:9]}\n{encoded[9:]}\n", f"data:image/png;base64,{encoded[:9]}\n{encoded[9:]}"]
    for source in sources:
        image = load_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), PIXELS), source


def test_an_image_that_lies_on_its_side_is_put_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = load_image(file_of(IMAGE, exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(PIXELS[..., 0]), PIXELS[..., :1].repeat(3, 2)),
        (Image.new("1", (2, 1), 1), [[[255] * 3] * 2]),
        (Image.new("P", (1, 1), 0).convert("P"), [[[0, 0, 0]]]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[[255, 0, 0]]]),
        # What is transparent shows white, what is half so is half white.
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), [[[255, 255, 255]]]),
        (Image.new("LA", (1, 1), (0, 127)), [[[128, 128, 128]]]),
        (Image.fromarray(np.array([[0, 257, 65400, 65535]], dtype=np.uint16)), [[[v] * 3 for v in (0, 1, 254, 255)]]),
        (Image.fromarray(np.array([[514]], dtype=np.int32)), [[[2, 2, 2]]]),
    ],
)
def test_every_mode_becomes_rgb(image, expected):
    assert np.asarray(load_image(image)).tolist() == np.asarray(expected).tolist()
    if image.mode not in ("CMYK", "I"):
        assert np.asarray(load_image(file_of(image))).tolist() == np.asarray(expected).tolist()


def test_transparency_of_a_palette_shows_white():
    image = Image.new("P", (1, 1), 0)
    image.putpalette([9, 9, 9])
    assert np.asarray(load_image(file_of(image, transparency=0))).tolist() == [[[255, 255, 255]]]


def test_the_first_of_several_frames_is_used_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(loading, "_warned_of_frames", False)
    other = Image.fromarray(255 - PIXELS)
    content = file_of(IMAGE, save_all=True, append_images=[other])
    for _ in range(2):
        assert np.array_equal(np.asarray(load_image(content)), PIXELS)
    assert [record.message[:54] for record in caplog.records] == [
        "An image in the format PNG has 2 frames, of which the "
    ]


@pytest.mark.parametrize(
    "source, message",
    [
        (CONTENT[:-40], "the image is broken: "),
        (b"no image at all", "the image is no image that Pillow reads (it begins with b'no image')"),
        (b"", "it begins with b''"),
        ("none.png", "there is no file 'none.png' (seen from"),
        ({"bytes": None, "path": "none.jpg"}, "there is no file 'none.jpg'"),
        ({"bytes": None, "path": None}, "neither 'bytes' nor a 'path'"),
        (Image.new("RGB", (0, 3)), "the image has 0 × 3 pixels"),
        (np.zeros((0, 3, 3), np.uint8), "the image has 3 × 0 pixels"),
        (np.zeros((2, 2, 3)), "an array of shape (2, 2, 3) and type float64 is no image"),
        (Image.new("F", (1, 1)), "the mode 'F'"),
        (7, "7 is of type int; expected an image of Pillow"),
        (None, "None is of type NoneType"),
        (torch.zeros(2, 2), "[0., 0.]]) is of type Tensor"),
        ("data:image/png;base64,AAAA", "is no image that Pillow reads"),
    ],
)
def test_a_broken_image_is_named(source, message):
    with pytest.raises(ValueError) as error:
        load_image(source)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [20, 10])  # Pillow itself warns of the one, and refuses the other
def test_a_huge_image_is_refused(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for source in (IMAGE, CONTENT):
        with pytest.raises(ValueError, match="raise PIL.Image.MAX_IMAGE_PIXELS"):
            load_image(source)


def test_a_url_is_refused_offline_and_named_where_it_cannot_be_read(monkeypatch):
    monkeypatch.setattr(loading, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match="the image is the URL 'https://a.b/c.png', but HF_HUB_OFFLINE is set"):
        load_image("https://a.b/c.png")
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    with pytest.raises(ValueError, match="the image at 'http://127.0.0.1:9/c.png' cannot be fetched"):
        load_image("http://127.0.0.1:9/c.png")
