"""Rows of prompts with what a teacher is told beside them."""

from __future__ import annotations

from datasets import Dataset

from support.training import made_once


@made_once
def told_prompts(count: int = 12) -> Dataset:
    """Plain prompts and contexts of different lengths."""
    rows = [
        ("What color is " + "very " * (i % 3) + f"{i}?", f"It is blue {i * 7}." * (1 + i % 2)) for i in range(count)
    ]
    return Dataset.from_list([{"prompt": prompt, "privileged_context": context} for prompt, context in rows])


@made_once
def told_chats(count: int = 12) -> Dataset:
    """The same as messages."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
                "privileged_context": [
                    {"role": "user", "content": "A hint:"},
                    {"role": "assistant", "content": row["privileged_context"]},
                ],
            }
            for row in told_prompts(count)
        ]
    )
