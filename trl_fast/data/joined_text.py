"""Tokenizes a prompt and its completion as one text, which is then divided where the prompt ends."""

from __future__ import annotations

from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from .byte_spans import spans_of_text
from .formats import is_conversational
from .tokenization import template_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_joined(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Returns `prompt_ids` and `completion_ids` of a row with `prompt` and `completion`, as TRL's GOLD has them.

    Messages go through the chat template; nothing is put around text but an EOS token behind it, if it ends with none.
    A token of both prompt and completion is the completion's.
    """
    speaks = is_conversational(example)
    if speaks:
        options: Any = {**template_options(example), "tokenize": False}
        render = processing_class.apply_chat_template
        whole: Any = render(example["prompt"] + example["completion"], **options)
        start: Any = render(example["prompt"], add_generation_prompt=True, **options)
        prompt = commonprefix([start, whole])
    else:
        prompt, whole = example["prompt"], example["prompt"] + example["completion"]
    ids, ends = spans_of_text(processing_class, whole)
    length = len(prompt.encode())
    first = next((place for place, end in enumerate(ends) if end > length), len(ids))
    end_id = processing_class.eos_token_id
    if not speaks and end_id is not None and ids[-1:] != [end_id]:
        ids.append(end_id)
    return {"prompt_ids": ids[:first], "completion_ids": ids[first:]}
