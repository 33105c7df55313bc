"""Turns prompts with images and their completions into token ids, as TRL's collators for images do."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from trl_fast.data.chat_template import apply_chat_template
from trl_fast.data.conversation_checks import named_row_errors
from trl_fast.data.formats import is_conversational
from trl_fast.data.row_places import place
from trl_fast.data.tokenization import end_with, template_options

from .columns import fill_images, load_images
from .messages import clean_messages, prepare_multimodal_messages
from .reader import ImageReader, reads_images_one_by_one


def tokenize_with_images(
    example: dict[str, Any], columns: tuple[str, ...], reader: ImageReader, row: int, name: str
) -> tuple[list[int], list[list[int]]]:
    """Returns the token ids of a row's prompt, with those of its images, and of the completion in each of the columns.

    Prompt and completions are tokenized apart, without special tokens beyond those of the chat template. Text is taken
    as it is: its prompt marks the places of images with the processor's own token, and nothing is put behind its
    completions.

    Raises:
        ValueError: an image is broken, or there are more or fewer than places; the message names the row.
    """
    images = load_readable(example, reader, row, name)
    with named_row_errors(row, name):
        texts = {column: example[column] for column in ("prompt", *columns)}
        if is_conversational(example):
            messages = {column: prepare_multimodal_messages(clean_messages(texts[column])) for column in columns}
            messages["prompt"] = fill_images(texts["prompt"], images)
            options = template_options(example)
            texts = apply_chat_template(messages, reader.processor, chat_template=reader.chat_template, **options)
        prompt_ids = reader.text_ids(texts["prompt"], images)
        return prompt_ids, [reader.text_ids(texts[column]) for column in columns]


def tokenize_prompt_with_images(
    example: dict[str, Any], reader: ImageReader, row: int, name: str, **template_kwargs: Any
) -> list[int]:
    """Returns the token ids of a prompt of messages with the row's images, open for the answer.

    Raises:
        ValueError: the prompt is text, an image is broken, or there are more or fewer than places; the message names
            the row.
    """
    images = load_readable(example, reader, row, name)
    with named_row_errors(row, name):
        if not is_conversational(example):
            raise ValueError(
                "the prompt is text, but the dataset has images, whose places only messages tell; give the prompt as "
                "messages such as {'role': 'user', 'content': 'What is this?'}"
            )
        return reader.prompt_ids(fill_images(example["prompt"], images), **template_kwargs)


def tokenize_sequences_with_images(
    example: dict[str, Any], reader: ImageReader, row: int, name: str
) -> dict[str, list[int]]:
    """Returns the token ids of prompt + chosen and of prompt + rejected, as `reward_modeling.tokenize_reward` does.

    Raises:
        ValueError: an image is broken, or there are more or fewer than places; the message names the row.
    """
    images, prompt = load_readable(example, reader, row, name), example.get("prompt")

    def tokenize(completion: str | list[dict]) -> list[int]:
        if isinstance(completion, str):
            return reader.text_ids((prompt or "") + end_with(completion, reader.tokenizer.eos_token), images)
        messages = [*(prompt if isinstance(prompt, list) else []), *completion]
        return reader.text_ids(reader.render(fill_images(messages, images), **template_options(example)), images)

    with named_row_errors(row, name):
        return {f"{column}_ids": tokenize(example[column]) for column in ("chosen", "rejected")}


def load_readable(example: dict[str, Any], reader: ImageReader, row: int, name: str) -> list[Image]:
    """Returns the images of a row.

    Raises:
        ValueError: one is broken, or there are several and the processor does not read them one by one; names the row.
    """
    images = load_images(example, row, name)
    if len(images) > 1 and not reads_images_one_by_one(reader):
        raise ValueError(
            f"{place(name, row)} has {len(images)} images; {type(reader.processor).__name__} reads an image among "
            "others differently from one alone, so only rows with one image are supported."
        )
    return images
