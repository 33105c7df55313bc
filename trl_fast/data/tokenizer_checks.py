"""Checks that a tokenizer has the special tokens that data needs, and fits the model's head."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def check_tokenizer(processing_class: PreTrainedTokenizerBase, *, needs_eos: bool = False) -> None:
    """Checks that the tokenizer has a pad or an EOS token, and an EOS token where text needs one.

    Raises ValueError otherwise.
    """
    if processing_class.eos_token is None and needs_eos:
        raise ValueError(
            f"processing_class ({type(processing_class).__name__}) has eos_token=None, but completions given as text "
            "end with the EOS token. Set processing_class.eos_token, or give the data as messages."
        )
    if processing_class.pad_token is None and processing_class.eos_token is None:
        raise ValueError(
            f"processing_class ({type(processing_class).__name__}) has pad_token=None and eos_token=None; expected at "
            "least one of them to pad with. Set processing_class.pad_token."
        )


def check_head_vocabulary(
    processing_class: PreTrainedTokenizerBase, vocab_size: int, largest_id: int | None = None
) -> None:
    """Checks that the model's head of `vocab_size` rows has a row for every token id of the tokenizer.

    largest_id: the largest id in all the data (`check_token_ids`), None where it is unknown. Some models have special
    tokens beyond the head (Gemma 3's text models an image token); where no datum holds them there is only a warning.

    Raises ValueError otherwise.
    """
    beyond = [token_id for token_id in processing_class.get_vocab().values() if token_id >= vocab_size]
    if not beyond:
        return
    message = (
        f"processing_class ({type(processing_class).__name__}) has {len(processing_class)} tokens, the model's head "
        f"only vocab_size={vocab_size}. Call model.resize_token_embeddings({len(processing_class)}), or use the "
        "model's own tokenizer."
    )
    added = processing_class.added_tokens_decoder
    all_special = all(token_id in added and added[token_id].special for token_id in beyond)
    pad_or_eos = processing_class.eos_token_id if processing_class.pad_token is None else processing_class.pad_token_id
    if largest_id is None or largest_id >= vocab_size or not all_special or pad_or_eos in beyond:
        raise ValueError(message)
    logger.warning(f"{message} The data holds none of the tokens beyond the head, so training goes on.")
