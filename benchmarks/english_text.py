"""Makes rows of real English text without a hub: the topics of Python's own documentation."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def paragraphs() -> list[str]:
    """Returns paragraphs of more than a line, in the order in which they stand."""
    found = (part.strip() for name in sorted(topics) for part in topics[name].split("\n\n"))
    return [part for part in found if len(part) > 60]


def token_stream(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns the whole text as token ids (T,) int64."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text, return_tensors="pt").input_ids[0]


def passages(count: int, seed: int = 0, most: int = 8) -> Dataset:
    """Returns rows of `text`, one to `most` consecutive paragraphs each: lengths as uneven as people's own."""
    rng, parts = random.Random(seed), paragraphs()
    rows = []
    for _ in range(count):
        start, length = rng.randrange(len(parts) - most), rng.randint(1, most)
        rows.append({"text": "\n\n".join(parts[start : start + length])})
    return Dataset.from_list(rows)


def continuations(count: int, seed: int = 0) -> Dataset:
    """Returns pairs: some paragraphs as the prompt, the one that follows as chosen, one from elsewhere as rejected."""
    rng, parts = random.Random(seed), paragraphs()
    rows = []
    while len(rows) < count:
        start, length = rng.randrange(len(parts) - 4), rng.randint(1, 3)
        row = {
            "prompt": "\n\n".join(parts[start : start + length]) + "\n\n",
            "chosen": parts[start + length],
            "rejected": rng.choice(parts),
        }
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    return Dataset.from_list(rows)


def cut_continuations(
    count: int, prompt_tokens: int, completion_tokens: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Dataset:
    """Returns such pairs with prompts and completions of given lengths, in tokens before they are tokenized anew."""
    rng, stream = random.Random(seed), token_stream(tokenizer)
    last = len(stream) - prompt_tokens - completion_tokens

    def text(start: int, length: int) -> str:
        return tokenizer.decode(stream[start : start + length])

    rows = []
    for _ in range(count):
        start, elsewhere = rng.randrange(last), rng.randrange(last)
        rows.append(
            {
                "prompt": text(start, prompt_tokens),
                "chosen": text(start + prompt_tokens, completion_tokens),
                "rejected": text(elsewhere, completion_tokens),
            }
        )
    return Dataset.from_list(rows)
