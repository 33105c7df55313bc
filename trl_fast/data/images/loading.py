"""Turns what a dataset holds of an image into an RGB image of Pillow."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from huggingface_hub import get_session, is_offline_mode
from PIL import Image, ImageOps

from trl_fast.data.row_places import shorten

logger = logging.getLogger(__name__)

_URLS = ("http://", "https://")
_SECONDS = 20
_EXPECTED = (
    "expected an image of Pillow, a dict with 'bytes' or 'path', a path, the bytes of a file, a data: URL, or an "
    "array (height, width, 3) of uint8"
)
_BOMB_REMEDY = (
    "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if the image can be trusted (its limit guards against files "
    "that fill the memory)"
)
# Files of these formats have further frames that belong to the same picture, such as a preview.
_ONE_PICTURE = ("MPO",)

_warned_of_frames = False


def load_image(source: Any) -> Image.Image:
    """Returns an upright RGB image of what a dataset holds: (width, height), 8 bits a channel.

    Its EXIF orientation is applied. Transparent parts show white. 16 bits are scaled to 8. Of several frames the first
    is taken, with one warning a process.

    Args:
        source: an image of Pillow, a dict with `bytes` or `path`, a path, the bytes of a file, text in base64 or a
            data URL, an http URL, or an array of uint8, (height, width) or (height, width, 1, 3 or 4 channels).

    Raises:
        ValueError: there is no image, it is broken, has no pixels, has more than Pillow's limit, or is a URL that
            cannot be read.
    """
    return load_with_mode(source)[0]


def load_with_mode(source: Any) -> tuple[Image.Image, str]:
    """Returns what `load_image` does, and the mode that the image has in its file."""
    try:
        image = _opened(source)
        _check_size(image)
        _warn_of_frames(image)
        image.load()
        return _in_rgb(ImageOps.exif_transpose(image)), image.mode
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; {_BOMB_REMEDY}") from error
    except ValueError:
        raise
    # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, zlib.error, IndexError.
    except Exception as error:
        raise ValueError(f"{_describe(source)} is broken: {error}; replace it, or remove the row") from error


def _opened(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Mapping) and source.keys() & {"bytes", "path"}:
        content = source.get("bytes")
        source = content if content is not None else source.get("path")
        if source is None:
            raise ValueError("the image has neither 'bytes' nor a 'path'; fill one of them, or remove the row")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _opened_bytes(bytes(source), source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return _opened_text(source)
    if isinstance(source, np.ndarray):
        return _opened_array(source)
    raise ValueError(f"{shorten(source)} is of type {type(source).__name__}; {_EXPECTED}")


def _opened_text(source: str) -> Image.Image:
    if source.startswith(_URLS):
        return _opened_bytes(_fetched(source), source)
    if os.path.isfile(source):
        return Image.open(source)
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        # Encoders break lines.
        content = base64.b64decode("".join(encoded.split()), validate=not source.startswith("data:"))
    except ValueError:
        content = b""
    if not content or (len(source) < 256 and not source.startswith("data:") and "." in source):
        raise ValueError(f"there is no file {shorten(source)} (seen from {os.getcwd()}); {_EXPECTED}")
    return _opened_bytes(content, source)


def _fetched(url: str) -> bytes:
    remedy = "write the images to files once, and give their paths"
    if is_offline_mode():
        raise ValueError(f"the image is the URL {shorten(url)}, but HF_HUB_OFFLINE is set; {remedy}")
    try:
        response = get_session().get(url, timeout=_SECONDS)
        response.raise_for_status()
        return response.content
    # The client's errors have no common name in the versions of huggingface_hub.
    except Exception as error:
        raise ValueError(f"the image at {shorten(url)} cannot be fetched: {error}; {remedy}") from error


def _opened_bytes(content: bytes, source: Any) -> Image.Image:
    try:
        return Image.open(BytesIO(content))
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{_describe(source)} is no image that Pillow reads (it begins with {content[:8]!r}); replace it, or "
            "remove the row"
        ) from error


def _opened_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape} and type {array.dtype} is no image; {_EXPECTED}")
    if array.size == 0:
        raise ValueError(_no_pixels((array.shape[1], array.shape[0])))
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if not width or not height:
        raise ValueError(_no_pixels(image.size))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"the image has {width} × {height} pixels, more than Pillow's limit of {limit}; {_BOMB_REMEDY}"
        )


def _no_pixels(size: tuple[int, int]) -> str:
    return f"the image has {size[0]} × {size[1]} pixels, so there is nothing to see; replace it, or remove the row"


def _warn_of_frames(image: Image.Image) -> None:
    global _warned_of_frames
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _ONE_PICTURE and not _warned_of_frames:
        _warned_of_frames = True
        logger.warning(
            f"An image in the format {image.format} has {frames} frames, of which the first is used. Other images may "
            "have several too; this is said once."
        )


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError(
            "the image has the mode 'F' (floating point), whose range is not known; scale it to 0 … 255 and convert "
            "it to 'L' or 'RGB'"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut every value above 255 to white.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _describe(source: Any) -> str:
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    named = isinstance(source, (str, os.PathLike)) and not str(source).startswith("data:")
    return f"the image {shorten(str(source))}" if named else "the image"
