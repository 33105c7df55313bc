"""Talks to a model's processor: token ids of prompts with images, and the model's inputs of one image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from .columns import load_images
from .inputs import ImageInput
from .messages import images_of
from .sized_images import with_sized_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# What a processor says of tokens (PaliGemma's gives labels too); the rest of what it makes is the images'.
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "assistant_masks", "labels")


@dataclass(frozen=True, eq=False)
class ImageReader:
    """Reads prompts with images through a model's processor.

    Images are Pillow's, as `loading.load_image` returns them. All token ids hold an image's tokens as often as the
    model asks for, with the marks around them.

    Raises:
        ValueError: the processor has no image processor, no tokenizer, or no image token.
    """

    processor: ProcessorMixin
    _sized: ProcessorMixin = field(init=False, repr=False)

    def __post_init__(self) -> None:
        named = f"processing_class ({type(self.processor).__name__})"
        for part in ("image_processor", "tokenizer"):
            if getattr(self.processor, part, None) is None:
                raise ValueError(f"{named} has no {part}, so it cannot read images; give the model's own processor.")
        if not isinstance(self._first_image_token(), int):
            raise ValueError(f"{named} has no image token, so images have no places; give the model's own processor.")
        object.__setattr__(self, "_sized", with_sized_images(self.processor))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the processor's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        return tokenizer

    @property
    def chat_template(self) -> str | dict[str, str]:
        """Returns the chat template of the processor, or of its tokenizer where it has none.

        Raises:
            ValueError: neither has one.
        """
        template: Any = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if template is None:
            raise ValueError(
                f"processing_class ({type(self.processor).__name__}) has no chat template, which says where images "
                "stand in messages; set its chat_template"
            )
        return template

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

    def text_ids(self, text: str, images: Sequence[PIL.Image.Image] = ()) -> list[int]:
        """Returns the token ids of a text with places for these images, without special tokens around it.

        Raises:
            ValueError: there are more or fewer images than places.
        """
        processor: Any = self.processor
        if images or processor.image_token in text:
            with self._named_lack_of_images():
                ids = _ids(_encode(self._sized, text, images))
        else:
            # PaliGemma's processor takes no text without images.
            ids = _ids(self.tokenizer([text], add_special_tokens=False))
        self._check_tokens(ids, images)
        return ids

    def prompt_ids(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Returns the token ids of messages with the images in their parts, open for the answer.

        options: arguments of the chat template, such as `tools`.
        """
        return _ids(self.conversation(messages, add_generation_prompt=True, **options))

    def conversation(self, messages: Sequence[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
        """Returns the token ids of messages with the images in their parts, and their masks, in a batch of one.

        options: arguments of the processor's `apply_chat_template`.

        Raises:
            ValueError: the text has tokens of images beyond those of the messages' images.
        """
        processor: Any = self._sized
        # The chat template has written the special tokens.
        options = {"chat_template": self.chat_template, "processor_kwargs": {"add_special_tokens": False}, **options}
        with self._named_lack_of_images():
            batch: Mapping[str, Any] = processor.apply_chat_template(
                [list(messages)], tokenize=True, return_dict=True, **options
            )
        self._check_tokens(_ids(batch), images_of(messages))
        return {name: value for name, value in batch.items() if name in _OF_TOKENS}

    @contextmanager
    def _named_lack_of_images(self) -> Iterator[None]:
        """Raises a ValueError where a processor runs out of images; some of transformers 5.17 do not count them."""
        try:
            yield
        except (StopIteration, IndexError, UnboundLocalError) as error:
            processor: Any = self.processor
            raise ValueError(
                f"the text has more places for images than there are images; does the text itself hold "
                f"{processor.image_token!r}? Remove it there"
            ) from error

    def _check_tokens(self, ids: Sequence[int], images: Sequence[PIL.Image.Image]) -> None:
        """Checks that all image tokens among the ids of a text stand for its images, of which there is one at most.

        Not every processor does that, nor every version of transformers. Of several images pixels would have to be
        made again; their tokens are counted in the batch.
        """
        if len(images) > 1:
            return
        token, found = self.image_token_id, ids.count(self.image_token_id)
        processor: Any = self._sized
        expected = sum(_ids(_encode(processor, processor.image_token, [image])).count(token) for image in images)
        if found != expected:
            raise ValueError(
                f"the text has {found} image tokens, but its images have {expected}; does the text itself hold "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r}, which stands for images alone? Remove it there"
            )

    def image_input(self, image: PIL.Image.Image) -> ImageInput:
        """Returns what the model reads of an image: the processor runs on the mark of an image alone."""
        processor: Any = self.processor
        encoded = _encode(processor, processor.image_token, [image], return_tensors="pt")
        tensors = {name: torch.as_tensor(value) for name, value in encoded.items() if name not in _OF_TOKENS}
        return ImageInput(tensors, int((encoded["input_ids"] == self.image_token_id).sum()))

    def image_inputs(self, messages: Sequence[dict[str, Any]]) -> tuple[ImageInput, ...]:
        """Returns what the model reads of the images in the parts of messages, in order."""
        return tuple(map(self.image_input, images_of(messages)))

    def row_inputs(self, row: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        """Returns what the model reads of the images of a prepared row (`columns.row_images`), in order."""
        return tuple(map(self.image_input, load_images(row)))


def _encode(processor: Any, text: str, images: Sequence[PIL.Image.Image], **options: Any) -> Mapping[str, Any]:
    # The chat template has written the special tokens.
    encoded: Mapping[str, Any] = processor(
        text=[text], images=[list(images)] if images else None, add_special_tokens=False, **options
    )
    return encoded


def _ids(batch: Mapping[str, Any]) -> list[int]:
    """Returns the token ids of a batch of one text, which some processors give as a tensor."""
    ids: list[int] = torch.as_tensor(batch["input_ids"][0]).tolist()
    return ids


@lru_cache(maxsize=8)
def reads_images_one_by_one(reader: ImageReader) -> bool:
    """Says whether the processor makes of each of several images what it makes of it alone; tried out on two."""
    images = [PIL.Image.new("RGB", size) for size in ((56, 28), (56, 84))]
    processor: Any = reader.processor
    together = reader.text_ids(processor.image_token * 2, images).count(reader.image_token_id)
    return together == sum(reader.image_input(image).num_tokens for image in images)
