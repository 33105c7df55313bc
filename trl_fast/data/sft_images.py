"""Makes token ids and labels of rows with images, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .assistant_turns import joined_rows, turn_rows
from .chat_template import apply_chat_template
from .formats import is_conversational
from .images import ImageReader, images_of
from .sft_batch import IGNORED
from .sft_format import SFTFormat
from .tokenization import template_options


def tokenize_with_images(
    example: dict[str, Any], images: Sequence[Any], reader: ImageReader, how: SFTFormat
) -> dict[str, list[int]]:
    """Returns `input_ids` and `labels` of a row as a model's processor reads it, as TRL makes them.

    An image is as many tokens as the model asks for, learned where the text around it is. Messages go through the chat
    template, with the row's `tools` and `chat_template_kwargs`. A prompt and its completion are rendered together and
    tokenized apart. Text is taken as it is: it gets no special tokens and no EOS token.

    Args:
        example: `messages`, or `prompt` and `completion`, with Pillow's images in the parts of the messages; or text.
        images: Pillow's, those of a row of text; messages have their own.
        reader: reads with the processor.
        how: tells the columns and what is learned.
    """
    if "completion" in example:
        return _tokenize_completion(example, images, reader, how.completion_only_loss)
    if not is_conversational(example):
        ids = reader.text_ids(example[how.text_field], images)
        return {"input_ids": ids, "labels": ids}
    options = {"chat_template": how.chat_template or reader.chat_template, **template_options(example)}
    if how.assistant_only_loss:
        options["return_assistant_tokens_mask"] = True
    encoded = reader.conversation(example["messages"], **options)
    ids = encoded["input_ids"][0]
    if not how.assistant_only_loss:
        return {"input_ids": ids, "labels": ids}
    said = encoded["assistant_masks"][0]
    return {"input_ids": ids, "labels": [token if bit else IGNORED for token, bit in zip(ids, said, strict=True)]}


def tokenize_turns_with_images(
    example: dict[str, Any], reader: ImageReader, how: SFTFormat
) -> dict[str, list[int]]:
    """Returns `input_ids`, `labels` and `seq_lengths` of the sequences of a conversation, one for each turn.

    A turn's sequence has the images that stand before it in the conversation: the first ones of the row.
    """
    turns = turn_rows(example, completion_only=how.completion_only_loss)
    template = how.chat_template or reader.chat_template
    return joined_rows(_tokenize_completion(turn, (), reader, True, chat_template=template) for turn in turns)


def _tokenize_completion(
    example: dict[str, Any], images: Sequence[Any], reader: ImageReader, completion_only: bool, **options: Any
) -> dict[str, list[int]]:
    if is_conversational(example):
        images = images_of(example["prompt"])
        options = {"chat_template": reader.chat_template, **template_options(example), **options}
        example = apply_chat_template(
            {"prompt": example["prompt"], "completion": example["completion"]}, reader.processor, **options
        )
    prompt, completion = reader.text_ids(example["prompt"], images), reader.text_ids(example["completion"])
    ids = prompt + completion
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + completion if completion_only else ids}
