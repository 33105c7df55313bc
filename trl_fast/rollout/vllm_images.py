"""Writes images as vLLM takes them: with token ids in its own process, and for a server's endpoints."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from typing import Any

from PIL import Image


def multi_modal_data(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Returns what vLLM's `generate` takes of pictures beside a prompt's token ids; nothing without any."""
    if not pictures:
        return {}
    return {"multi_modal_data": {"image": list(pictures) if len(pictures) > 1 else pictures[0]}}


def image_messages(pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Returns a conversation of nothing but these pictures, as vLLM's server takes it: as data URLs."""
    parts = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": parts}]


def _data_url(picture: Image.Image) -> str:
    content = BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def placed_features(features: dict[str, Any], ids: Sequence[int], image_token_id: int) -> dict[str, Any]:
    """Returns a server's features of pictures with the places of the image tokens among a prompt's ids.

    The server says where they stand in the conversation that it read them in, which is another one.

    Raises:
        ValueError: the prompt has not one run of image tokens for each picture.
    """
    places, start = [], 0
    for token, run in groupby(ids):
        length = len(list(run))
        if token == image_token_id:
            places.append({"offset": start, "length": length})
        start += length
    known = features["mm_placeholders"]
    if len(places) != len(known["image"]):
        raise ValueError(
            f"the prompt has {len(places)} runs of image tokens for {len(known['image'])} images; vLLM's server takes "
            "one run an image only: use vllm_mode='colocate', or generate without vLLM"
        )
    return {**features, "mm_placeholders": {**known, "image": places}}
