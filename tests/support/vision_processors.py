"""Tiny processors of families that read images, with tokenizers, made without a hub and without torchvision."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import transformers
from PIL import Image
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_torchvision_available

from support.tokenizer import build_tokenizer

# Ids of text; those of images come after them, so that random text has none.
TEXT_TOKENS = 340
# A message's content is a string, or parts of text and images, as in the templates of real families.
_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}IMAGE{% elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# SmolVLM's processor asks for a package that spells the numbers of a video's frames.
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def _pixtral_without_torchvision() -> None:
    """Gives transformers its own processor of Pixtral, which asks for torchvision and needs pillow alone."""
    package = "transformers.models.pixtral"
    sys.modules.setdefault(
        f"{package}.image_processing_pixtral", import_module(f"{package}.image_processing_pil_pixtral")
    )
    made = import_module(f"{package}.processing_pixtral").PixtralProcessor
    for module in (transformers, import_module(package)):
        module.PixtralProcessor = made


if not is_torchvision_available():
    _pixtral_without_torchvision()


class StillImages(BaseImageProcessor):
    """Stands where a processor insists on one for videos: transformers' own need torchvision."""

    merge_size, temporal_patch_size, num_frames, fps, size = 2, 2, 1, 1, None

    def __init__(self, **kwargs: object) -> None:
        pass

    def to_dict(self) -> dict:
        return {"video_processor_type": "StillImages"}

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> StillImages:
        return cls()


class _StillImagesConfig(PretrainedConfig):
    model_type = "still_images"


AutoVideoProcessor.register(_StillImagesConfig, StillImages, exist_ok=True)
_check_class = ProcessorMixin.check_argument_for_proper_class


def _check_class_unless_still(self: ProcessorMixin, name: str, value: object) -> object:
    return StillImages if isinstance(value, StillImages) else _check_class(self, name, value)


ProcessorMixin.check_argument_for_proper_class = _check_class_unless_still


@dataclass(frozen=True)
class _Family:
    """The parts of a family's processor.

    - `names`: the classes of its processor and its image processor.
    - `image`: keywords of the image processor; `values`: of the processor itself.
    - `tokens`: attributes of the tokenizer and the special tokens that they name.
    - `ids`: attributes of the model's config and the special tokens whose ids they are.
    - `placeholder`: what the chat template writes for an image.
    - `others`: what else the processor is given, made by calling it.
    """

    names: tuple[str, str]
    image: dict
    tokens: dict[str, str]
    ids: dict[str, str]
    placeholder: str
    values: dict = field(default_factory=dict)
    others: dict[str, Callable[[], object]] = field(default_factory=dict)


def _qwen(name: str) -> _Family:
    tokens = {f"{each}_token": f"<|{each}|>" for each in ("vision_start", "vision_end")}
    tokens |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return _Family(
        (name, "Qwen2VLImageProcessorPil"),
        {"min_pixels": 28 * 28, "max_pixels": 84 * 84, "patch_size": 14, "merge_size": 2},
        tokens,
        {f"{name}_id": token for name, token in tokens.items()},
        "<|vision_start|><|image_pad|><|vision_end|>",
        others={"video_processor": StillImages},
    )


def _llava(name: str, image_processor: str, image: dict, **values: object) -> _Family:
    token = "<image>"
    return _Family((name, image_processor), image, {"image_token": token}, {"image_token_id": token}, token, values)


def _idefics(name: str, *, tiles: bool = False, **others: Callable[[], object]) -> _Family:
    tokens = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    tokens |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokens |= {f"tile_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2) if tiles}
    edge = {"longest_edge": 28}
    return _Family(
        (f"{name}Processor", f"{name}ImageProcessorPil"),
        {"size": {"longest_edge": 56} if tiles else edge, "max_image_size": edge, "do_image_splitting": tiles},
        tokens,
        {"image_token_id": "<image>"},
        "<image>",
        {"image_seq_len": 4},
        others,
    )


_SQUARE = {"height": 28, "width": 28}
# The sizes in which images are cut into tiles (LLaVA-Next, LLaVA-OneVision).
TILES = [[28, 56], [56, 28], [56, 56]]
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA_4 = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA_4 |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM |= {f"{each}_token": f"<|{each}|>" for each in ("begin_of_image", "end_of_image")}
_INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
_INTERN |= {"context_image_token": "<IMG_CONTEXT>"}
_PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}

_FAMILIES = {
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": _qwen("Qwen3VLProcessor"),
    "qwen3_5": _qwen("Qwen3VLProcessor"),
    "gemma3": _Family(
        ("Gemma3Processor", "Gemma3ImageProcessorPil"),
        {"size": _SQUARE},
        _GEMMA,
        {f"{name}_id": token for name, token in _GEMMA.items()},
        "<start_of_image>",
        {"image_seq_length": 4},
    ),
    "gemma4": _Family(
        ("Gemma4Processor", "Gemma4ImageProcessorPil"),
        {"patch_size": 7, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        _GEMMA_4,
        {
            **{f"{name}_token_id": _GEMMA_4[f"{name}_token"] for name in ("image", "boi", "eoi", "audio", "boa")},
            "eoa_token_index": "<audio|>",
            "video_token_id": "<|video|>",
        },
        "<|image|>",
        {"image_seq_length": 70},
        {
            "video_processor": StillImages,
            "feature_extractor": transformers.Gemma4AudioFeatureExtractor,
        },
    ),
    "llava": _llava(
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 28}, "crop_size": _SQUARE},
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava_next": _llava(
        "LlavaNextProcessor",
        "LlavaNextImageProcessorPil",
        {"size": {"shortest_edge": 28}, "crop_size": _SQUARE, "image_grid_pinpoints": TILES},
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava_onevision": _Family(
        ("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessorPil"),
        {"size": _SQUARE, "image_grid_pinpoints": [[28, 28], *TILES]},
        {"image_token": "<image>", "video_token": "<video>"},
        {"image_token_id": "<image>", "video_token_id": "<video>"},
        "<image>",
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        {"video_processor": StillImages},
    ),
    "mistral3": _Family(
        ("PixtralProcessor", "PixtralImageProcessorPil"),
        {"size": {"longest_edge": 56}, "patch_size": 7},
        _PIXTRAL,
        {"image_token_id": "[IMG]"},
        "[IMG]",
        {"patch_size": 7, "spatial_merge_size": 2},
    ),
    "smolvlm": _idefics("SmolVLM", video_processor=StillImages),
    "idefics3": _idefics("Idefics3", tiles=True),
    "internvl": _Family(
        ("InternVLProcessor", "GotOcr2ImageProcessorPil"),
        {"size": _SQUARE, "max_patches": 4},
        _INTERN,
        {"image_token_id": "<IMG_CONTEXT>"},
        "<IMG_CONTEXT>",
        {"image_seq_length": 4},
        {"video_processor": StillImages},
    ),
    "glm4v": _Family(
        ("Glm4vProcessor", "Glm4vImageProcessorPil"),
        {"size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84 * 2}, "patch_size": 14, "merge_size": 2},
        _GLM,
        {
            **{f"{name}_token_id": f"<|{name}|>" for name in ("image", "video")},
            **{
                f"image_{name}_token_id": f"<|{word}_of_image|>" for name, word in (("start", "begin"), ("end", "end"))
            },
        },
        "<|begin_of_image|><|image|><|end_of_image|>",
        others={"video_processor": StillImages},
    ),
    "paligemma": _llava("PaliGemmaProcessor", "SiglipImageProcessorPil", {"size": _SQUARE, "image_seq_length": 16}),
}
WITH_PROCESSORS = tuple(_FAMILIES)


@cache
def special_ids(name: str) -> dict[str, int]:
    """The ids of a family's special tokens, by the attributes of its config, and `vocab_size`."""
    if name not in _FAMILIES:
        return {"image_token_id": TEXT_TOKENS, "vocab_size": TEXT_TOKENS + 1}
    tokenizer = tiny_processor(name).tokenizer
    found = {key: tokenizer.convert_tokens_to_ids(token) for key, token in _FAMILIES[name].ids.items()}
    return {**found, "vocab_size": len(tokenizer)}


def _tokenizer(tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    text = build_tokenizer()
    text.add_tokens([f"<unused{number}>" for number in range(TEXT_TOKENS - len(text))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=text.backend_tokenizer,
        **{name: getattr(text, name) for name in ("bos_token", "eos_token", "pad_token")},
        extra_special_tokens=tokens,
    )
    assert len(text) == TEXT_TOKENS and len(made) == TEXT_TOKENS + len(set(tokens.values()))
    return made


def tiny_processor(name: str) -> ProcessorMixin:
    """A family's processor, whose ids are those of `tiny_vision_model(name)`; an image is 1 to 24 tokens."""
    family = _FAMILIES[name]
    processor, image_processor = (getattr(transformers, each) for each in family.names)
    return processor(
        image_processor=image_processor(**family.image),
        tokenizer=_tokenizer(family.tokens),
        chat_template=_TEMPLATE.replace("IMAGE", family.placeholder),
        **family.values,
        **{key: make() for key, make in family.others.items()},
    )


def pictures(count: int, size: tuple[int, int] = (56, 56), seed: int = 0) -> list[Image.Image]:
    """Pictures of noise, all different; size: width and height in pixels."""
    width, height = size
    return [Image.frombytes("RGB", size, random.Random(seed + n).randbytes(width * height * 3)) for n in range(count)]


def save_tiny_vision_model(folder: Path, name: str, **changes: object) -> str:
    """Writes a model and its processor; the folder's name as `from_pretrained` takes it."""
    from support.vision_models import tiny_vision_model

    tiny_vision_model(name, **changes).save_pretrained(folder)
    tiny_processor(name).save_pretrained(folder)
    return str(folder)
