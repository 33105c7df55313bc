"""Prepares a trainer's tokenizer: the model's own unless one is given, with a pad token."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from trl_fast.modeling.chat_template import set_chat_template, set_eos_token
from trl_fast.modeling.loading import load_tokenizer, reads_more_than_text
from trl_fast.settings.older_names import deprecated

from .config import BaseConfig

# What a processor writes beside its tokenizer.
_IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def checked_tokenizer(
    processing_class: object | None, model: PreTrainedModel, args: BaseConfig
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that is given, that of a processor that is given, or the one of the model's name.

    Raises:
        TypeError: it is no tokenizer, and no processor with one.
        OSError, ValueError: the model has no name, or its name no tokenizer.
    """
    if processing_class is None:
        name = model.config._name_or_path
        if not name:
            raise OSError(
                f"processing_class is missing: {type(model).__name__} was not loaded by a name, which would tell its "
                "tokenizer; give processing_class=AutoTokenizer.from_pretrained(...)"
            )
        processing_class = load_tokenizer(
            name,
            revision=(args.model_init_kwargs or {}).get("revision", "main"),
            trust_remote_code=args.trust_remote_code,
        )
    processing_class = tokenizer_of(processing_class)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class: expected a tokenizer, got {type(processing_class).__name__}")
    return processing_class


def save_image_settings(model: torch.nn.Module | None, folder: str) -> None:
    """Copies how images are read to the folder of a model that reads them, from the one that it was loaded from.

    Training on text needs none of it; who loads or serves the model does. Files of a processor that is saved stay.
    """
    if not isinstance(model, PreTrainedModel) or not reads_more_than_text(model) or not model.config._name_or_path:
        return
    for name in _IMAGE_SETTINGS:
        file = cached_file(
            model.config._name_or_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if file is not None and not os.path.exists(os.path.join(folder, name)):
            shutil.copy(file, folder)


def tokenizer_of(processing_class: Any) -> Any:
    """Returns a processor's tokenizer, with the processor's chat template if it has none. A tokenizer stays."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is not None and getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    return tokenizer


def set_pad_token(processing_class: PreTrainedTokenizerBase, model: PreTrainedModel, args: BaseConfig) -> None:
    """Gives tokenizer and model the pad token of the arguments, the tokenizer's own, or its end token.

    Raises:
        ValueError: the vocabulary does not have it, or there is none of them.
    """
    if args.pad_token is not None:
        if args.pad_token not in processing_class.get_vocab():
            raise ValueError(f"pad_token={args.pad_token!r} is not in the tokenizer's vocabulary")
        processing_class.pad_token = args.pad_token
    if processing_class.pad_token is None:
        if processing_class.eos_token is None:
            raise ValueError(
                "processing_class has neither a pad token nor an eos token; set tokenizer.pad_token to a token "
                "of its vocabulary"
            )
        processing_class.pad_token = processing_class.eos_token
    model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = processing_class.pad_token_id


def set_end_token_and_template(
    processing_class: PreTrainedTokenizerBase, model: PreTrainedModel, args: BaseConfig
) -> list[int]:
    """Sets the end token and the chat template that `eos_token` and `chat_template_path` of the arguments name.

    Returns:
        The ids of the tokens that came with the template.

    Raises:
        ValueError: eos_token is not in the vocabulary.
        OSError: there is nothing at chat_template_path.
    """
    if args.eos_token is not None:
        set_eos_token(model, processing_class, args.eos_token)
    path = args.chat_template_path
    return [] if path is None else set_chat_template(model, processing_class, path)


def older_tokenizer_name(
    owner: str, processing_class: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """Returns `processing_class`, or what came under its older name `tokenizer`.

    Raises:
        ValueError: both were given.
    """
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ValueError("tokenizer and processing_class mean the same; give only processing_class")
    deprecated(owner, "tokenizer", "it works; processing_class is the present name.")
    return tokenizer
