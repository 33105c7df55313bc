"""Makes tokens of prompts that are known only now: of a user's own, and of those that environments write on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_fast.data.formats import is_conversational
from trl_fast.data.images.messages import prepare_multimodal_messages
from trl_fast.data.prompt_only import tokenize_prompt
from trl_fast.rollout import RolloutImages


def prompt_tokens(
    prompts: Sequence[Any],
    keywords: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    images: RolloutImages | None = None,
    longest: int | None = None,
) -> list[list[int]]:
    """Returns the token ids of prompts. Equal ones in a row are read once.

    Args:
        prompts: texts or conversations.
        keywords: what the chat template is given beside each conversation.
        images: reads those in conversations; None: there are none.
        longest: tokens of which a longer prompt keeps the last ones; None keeps all.
    """
    found: list[list[int]] = []
    before: Any = None
    for prompt, keyword in zip(prompts, keywords, strict=True):
        if found and before == (prompt, keyword):
            found.append(list(found[-1]))
            continue
        if images is not None and is_conversational({"prompt": prompt}):
            ids = images.reader.prompt_ids(prepare_multimodal_messages(prompt), **keyword)
        else:
            ids = tokenize_prompt(prompt, tokenizer, **keyword)
        found.append(ids if longest is None else ids[-longest:])
        before = prompt, keyword
    return found
