"""Collates rows with images as TRL's collators of the same names do, into tensors for a model's own forward.

They read rows of a dataset as they are: messages or texts, with the images in a column `images` or `image`. The
trainers have collators of their own, for prepared rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .images.columns import load_images
from .images.inputs import ImageInput
from .images.joining import join_images
from .images.reader import ImageReader
from .images.tokenization import tokenize_with_images
from .padded_rows import pad, padded_completions, padded_sequences
from .sft_batch import IGNORED
from .sft_format import SFTFormat
from .sft_images import check_images_fit, tokenize_sft_images
from .tensor_collator import TensorCollator

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Keywords under which models are told which tokens are those of images.
_TYPES = ("mm_token_type_ids", "token_type_ids")


def _image_entries(
    reader: ImageReader, images: Sequence[Sequence[ImageInput]], input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns what a model's forward is told of the images of padded rows (B, T), by keyword."""
    marks = (input_ids == reader.image_token_id).long()
    types = {name: marks for name in _TYPES if name in reader.processor.model_input_names}
    joined = [image for own in images for image in own]
    return types | (join_images(joined) if joined else {})


def _cut(ids: list[int], reader: ImageReader, max_length: int | None) -> list[int]:
    check_images_fit({"input_ids": ids}, reader.image_token_id, max_length)
    return ids[:max_length]


@dataclass
class DataCollatorForVisionLanguageModeling(TensorCollator):
    """Collates rows of `messages`, `prompt` and `completion`, or text, with images.

    Returns a dict of `input_ids`, `attention_mask` and `labels` (B, T) int64, padded on the right to the longest row,
    rounded up to `pad_to_multiple_of`, and what the model reads of the images. A row loses its end beyond
    `max_length`.

    Args:
        processor: the model's.
        completion_only_loss: whether only completions are learned, of rows that have a prompt.
        dataset_text_field: the column of text.
        assistant_only_loss: whether only what the assistant says is learned; the chat template has to mark it.
        chat_template: to be used instead of the processor's own.

    Raises:
        ValueError: the rows have nothing of what is to be learned, an image is broken, or max_length cuts one.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    completion_only_loss: bool = False
    pad_to_multiple_of: int | None = None
    dataset_text_field: str = "text"
    assistant_only_loss: bool = False
    chat_template: str | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        first = examples[0].keys()
        if self.assistant_only_loss and "messages" not in first:
            raise ValueError(f"assistant_only_loss=True needs rows of messages, but a row has {sorted(first)}")
        if self.completion_only_loss and "completion" not in first:
            raise ValueError(f"completion_only_loss=True needs prompts and completions, but a row has {sorted(first)}")
        reader = ImageReader(self.processor)
        how = SFTFormat(
            self.dataset_text_field, self.completion_only_loss, self.assistant_only_loss, self.chat_template
        )
        images = [load_images(row, number, "batch") for number, row in enumerate(examples)]
        rows = [tokenize_sft_images(row, own, reader, how) for row, own in zip(examples, images, strict=True)]
        ids = [torch.tensor(_cut(row["input_ids"], reader, self.max_length)) for row in rows]
        labels = [torch.tensor(row["labels"][: self.max_length]) for row in rows]
        multiple = self.pad_to_multiple_of
        batch = padded_sequences(ids, reader.tokenizer.pad_token_id, multiple)
        inputs = [[reader.image_input(image) for image in own] for own in images]
        return {
            **batch,
            **_image_entries(reader, inputs, batch["input_ids"]),
            "labels": pad(labels, IGNORED, multiple),
        }


@dataclass
class DataCollatorForVisionPreference(TensorCollator):
    """Collates preference pairs with images in their prompts.

    Returns a dict of `input_ids`, `attention_mask` and `completion_mask` (2P, T) int64, all chosen sequences before
    all rejected ones, padded on the right, and what the model reads of the images, each twice. A sequence loses its
    end beyond `max_length`.

    Raises:
        ValueError: an image is broken, or max_length cuts one.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        reader = ImageReader(self.processor)
        columns = ("chosen", "rejected")
        rows = [tokenize_with_images(row, columns, reader, number, "batch") for number, row in enumerate(examples)]
        inputs = [reader.row_inputs(row) for row in examples]
        parts = [(prompt, completions[side]) for side in range(2) for prompt, completions in rows]
        return _completion_batch(reader, parts, inputs * 2, self.max_length, self.pad_to_multiple_of)


@dataclass
class DataCollatorForVisionUnpairedPreference(TensorCollator):
    """Collates labelled completions with images in their prompts.

    Returns a dict of `input_ids`, `attention_mask` and `completion_mask` (B, T) int64, padded on the right, `label`
    (B,), and what the model reads of the images. With `calculate_kl` also `KL_input_ids` and so on: each prompt with
    the completion of the row before it, the first one with the last row's. A sequence loses its end beyond
    `max_length`.

    Raises:
        ValueError: an image is broken, or max_length cuts one.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    calculate_kl: bool = True
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        reader = ImageReader(self.processor)
        rows = [
            tokenize_with_images(row, ("completion",), reader, number, "batch") for number, row in enumerate(examples)
        ]
        prompts, completions = [prompt for prompt, _ in rows], [completion for _, (completion,) in rows]
        inputs = [reader.row_inputs(row) for row in examples]
        limits = (self.max_length, self.pad_to_multiple_of)
        batch = _completion_batch(reader, list(zip(prompts, completions, strict=True)), inputs, *limits)
        if self.calculate_kl:
            # The images are those of the batch itself.
            others = list(zip(prompts, completions[-1:] + completions[:-1], strict=True))
            batch |= {f"KL_{name}": value for name, value in _completion_batch(reader, others, (), *limits).items()}
        return {**batch, "label": torch.tensor([row["label"] for row in examples])}


def _completion_batch(
    reader: ImageReader,
    parts: Sequence[tuple[list[int], list[int]]],
    images: Sequence[Sequence[ImageInput]],
    max_length: int | None,
    multiple: int | None,
) -> dict[str, torch.Tensor]:
    """Returns the entries of prompts and completions; images: those of each prompt."""
    sequences = [torch.tensor(_cut(prompt + completion, reader, max_length)) for prompt, completion in parts]
    lengths = [max(len(ids) - len(prompt), 0) for ids, (prompt, _) in zip(sequences, parts, strict=True)]
    batch = padded_completions(sequences, lengths, reader.tokenizer.pad_token_id, multiple)
    return batch | _image_entries(reader, images, batch["input_ids"])
