"""Talks to a model's processor: token ids of prompts with images, and the model's inputs of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .inputs import ImageInput
from .messages import images_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# What a processor says of tokens; the rest of what it makes is the images'.
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ImageReader:
    """Reads prompts with images through a model's processor.

    Images are Pillow's, as `loading.load_image` returns them. All token ids hold an image's tokens as often as the
    model asks for, with the marks around them.

    Raises:
        ValueError: the processor has no image processor, no tokenizer, no chat template, or no image token.
    """

    processor: ProcessorMixin

    def __post_init__(self) -> None:
        named = f"processing_class ({type(self.processor).__name__})"
        for part in ("image_processor", "tokenizer"):
            if getattr(self.processor, part, None) is None:
                raise ValueError(f"{named} has no {part}, so it cannot read images; give the model's own processor.")
        if self.chat_template is None:
            raise ValueError(
                f"{named} has no chat template, which says where images stand in messages; set its chat_template."
            )
        if not isinstance(self._first_image_token(), int):
            raise ValueError(f"{named} has no image token, so images have no places; give the model's own processor.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the processor's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        return tokenizer

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Returns the chat template of the processor, or of its tokenizer where it has none."""
        template: Any = getattr(self.processor, "chat_template", None)
        return self.tokenizer.chat_template if template is None else template

    @property
    def image_token_id(self) -> int:
        """Returns the id of the token that stands for a part of an image; marks around images have others."""
        return self._first_image_token()

    def _first_image_token(self) -> Any:
        # Gemma 3's `image_token_id` is the mark that opens an image; the plural has what stands for its parts first.
        return self.processor.image_token_ids[0]

    def render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Returns messages as text, with one place for each image; options: those of the chat template."""
        processor: Any = self.processor
        text: str = processor.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False, **options
        )
        return text

    def text_ids(self, text: str, images: Sequence[Image] = ()) -> list[int]:
        """Returns the token ids of a text with places for these images, without special tokens around it.

        Raises:
            ValueError: there are more or fewer images than places.
        """
        return self._encode(text, images)["input_ids"][0]

    def prompt_ids(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Returns the token ids of messages with the images in their parts, open for the answer.

        options: arguments of the chat template, such as `tools`.
        """
        return self.conversation(messages, add_generation_prompt=True, **options)["input_ids"][0]

    def conversation(self, messages: Sequence[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
        """Returns what the processor makes of messages with the images in their parts: a batch of one conversation.

        options: arguments of the processor's `apply_chat_template`.
        """
        processor: Any = self.processor
        batch: Mapping[str, Any] = processor.apply_chat_template(
            [list(messages)], chat_template=self.chat_template, tokenize=True, return_dict=True, **options
        )
        return batch

    def image_input(self, image: Image) -> ImageInput:
        """Returns what the model reads of an image: the processor runs on a message with this image alone."""
        text = self.render([{"role": "user", "content": [{"type": "image"}]}])
        encoded = self._encode(text, [image], return_tensors="pt")
        tensors = {name: torch.as_tensor(value) for name, value in encoded.items() if name not in _OF_TOKENS}
        return ImageInput(tensors, int((encoded["input_ids"] == self.image_token_id).sum()))

    def image_inputs(self, messages: Sequence[dict[str, Any]]) -> tuple[ImageInput, ...]:
        """Returns what the model reads of the images in the parts of messages, in order."""
        return tuple(map(self.image_input, images_of(messages)))

    def _encode(self, text: str, images: Sequence[Image], **options: Any) -> Mapping[str, Any]:
        processor: Any = self.processor
        # The chat template has written the special tokens.
        encoded: Mapping[str, Any] = processor(
            text=[text], images=[list(images)] if images else None, add_special_tokens=False, **options
        )
        return encoded
