"""Makes rows with pictures of noise, and a model of about 100 million weights that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
)

from examples.smollm2 import smollm2_folder

# Shaped as LLaVA: pictures of 336 × 336 pixels are 576 tokens. 72 million weights read text, 22 million pictures.
SIDE, PATCH = 336, 14
IMAGE_TOKEN = "<image>"
_TEXT = {
    **{"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 12, "head_dim": 64, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192, "vocab_size": 49153},
    **{"tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
}
_TOWER = {
    **{"model_type": "clip_vision_model", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12},
    **{"num_attention_heads": 6, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 384},
}
_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save_vision_model(folder: Path) -> None:
    """Writes the model, with random weights, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.model_max_length, tokenizer.chat_template = _TEXT["max_position_embeddings"], None
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        text_config=_TEXT,
        vision_config=_TOWER,
        image_token_id=token,
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def picture(seed: int) -> Image.Image:
    """Returns a picture of noise that fills the model's field of view."""
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def with_pictures(rows: Dataset) -> Dataset:
    """Returns rows of texts as rows of messages, each prompt with a picture of its own before it."""
    roles = {"prompt": "user"} | dict.fromkeys(("chosen", "rejected", "completion", "reference"), "assistant")

    def entry(name: str, value: object) -> object:
        return [{"role": roles[name], "content": value}] if name in roles else value

    return Dataset.from_list(
        [
            {
                **{name: entry(name, value) for name, value in row.items()},
                "images": [picture(number)],
            }
            for number, row in enumerate(rows)
        ]
    )


class PicturePrompts:
    """Serves as a `rollout_func` on rows with pictures: the completions of another one, prompts with image tokens.

    rollout: a `benchmarks.step_methods.CutCompletions`.
    """

    def __init__(self, processor: ProcessorMixin, rollout: Any) -> None:
        self.processor, self.rollout = processor, rollout
        self.completions = rollout.completions

    def __call__(self, prompts: list, trainer: Trainer) -> dict[str, list]:
        text = self.processor.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        expanded = IMAGE_TOKEN * (SIDE // PATCH) ** 2
        found = self.rollout([each.replace(IMAGE_TOKEN, expanded) for each in text], trainer)
        return found


def tokenizer_of(processor: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a processor's tokenizer, or the tokenizer that is given."""
    return getattr(processor, "tokenizer", processor)
