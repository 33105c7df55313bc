"""Makes token ids and labels of rows with images, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from .assistant_turns import joined_rows, turn_rows
from .chat_template import apply_chat_template
from .formats import is_conversational
from .images.columns import fill_images
from .images.messages import clean_messages, images_of, prepare_multimodal_messages
from .images.reader import ImageReader
from .sft_batch import IGNORED
from .sft_format import SFTFormat
from .tokenization import template_options

if TYPE_CHECKING:
    from PIL.Image import Image


def tokenize_sft_images(
    example: dict[str, Any], images: Sequence[Image], reader: ImageReader, how: SFTFormat
) -> dict[str, list[int]]:
    """Returns `input_ids` and `labels` of a row as a model's processor reads it; of separate turns also `seq_lengths`.

    As in TRL, an image is as many tokens as the model asks for, learned where the text around it is. Messages go
    through the chat template, with the row's `tools` and `chat_template_kwargs`. A prompt and its completion are
    rendered together and tokenized apart. Text is taken as it is: it gets no special tokens and no EOS token. A turn
    of a conversation has the images that stand before it: the first ones of the row.

    Args:
        example: `messages`, or `prompt` and `completion`, or text.
        images: those of the row, in the order of their places.
        reader: reads with the processor.
        how: tells the columns and what is learned.

    Raises:
        ValueError: there are more or fewer images than places, or assistant_only_loss is set for a completion.
    """
    if is_conversational(example):
        example, images = _with_images(example, images), ()
    if how.separates_turns:
        turns = turn_rows(example, completion_only=how.completion_only_loss)
        template = how.chat_template or reader.chat_template
        return joined_rows(_tokenize_completion(turn, (), reader, True, chat_template=template) for turn in turns)
    if "completion" in example:
        if how.assistant_only_loss:
            raise ValueError(
                "assistant_only_loss=True learns what the assistant says in 'messages' with images, but the row has "
                "'prompt' and 'completion'. Give it as messages, or set assistant_turns='separately'"
            )
        return _tokenize_completion(example, images, reader, how.completion_only_loss)
    if not is_conversational(example):
        ids = reader.text_ids(example[how.text_field], images)
        return {"input_ids": ids, "labels": ids}
    return _tokenize_messages(example, reader, how)


def check_images_fit(row: dict[str, list[int]], image_token_id: int, max_length: int | None) -> None:
    """Checks that no image of a tokenized row is cut at its end.

    row: `input_ids`, and `seq_lengths` where it holds several sequences.

    Raises ValueError otherwise.
    """
    if max_length is None:
        return
    ids = row["input_ids"]
    for start, end in pairwise([0, *accumulate(row.get("seq_lengths", [len(ids)]))]):
        places = [place for place in range(end - start) if ids[start + place] == image_token_id]
        if places and places[-1] >= max_length:
            raise ValueError(
                f"max_length={max_length} cuts an image, whose tokens end at {places[-1] + 1} of {end - start}. Set "
                f"max_length to {places[-1] + 1} or more, or to None"
            )


def _with_images(example: dict[str, Any], images: Sequence[Image]) -> dict[str, Any]:
    """Returns a conversational row with its images in the parts of its messages."""
    seen = "messages" if "messages" in example else "prompt"
    changed = {seen: fill_images(example[seen], images)}
    if "completion" in example:
        changed["completion"] = prepare_multimodal_messages(clean_messages(example["completion"]))
    return {**example, **changed}


def _tokenize_messages(example: dict[str, Any], reader: ImageReader, how: SFTFormat) -> dict[str, list[int]]:
    options = {"chat_template": how.chat_template or reader.chat_template, **template_options(example)}
    if how.assistant_only_loss:
        options["return_assistant_tokens_mask"] = True
    encoded = reader.conversation(example["messages"], **options)
    ids = encoded["input_ids"][0]
    if not how.assistant_only_loss:
        return {"input_ids": ids, "labels": ids}
    said = encoded["assistant_masks"][0]
    return {"input_ids": ids, "labels": [token if bit else IGNORED for token, bit in zip(ids, said, strict=True)]}


def _tokenize_completion(
    example: dict[str, Any], images: Sequence[Image], reader: ImageReader, completion_only: bool, **options: Any
) -> dict[str, list[int]]:
    if is_conversational(example):
        images = images_of(example["prompt"])
        options = {"chat_template": reader.chat_template, **template_options(example), **options}
        messages = {"prompt": example["prompt"], "completion": example["completion"]}
        example = apply_chat_template(messages, reader.processor, **options)
    prompt, completion = reader.text_ids(example["prompt"], images), reader.text_ids(example["completion"])
    ids = prompt + completion
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + completion if completion_only else ids}
