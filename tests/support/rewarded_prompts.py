"""Rows of prompts with feedback beside some of them, and rewards that some completions earn."""

from __future__ import annotations

from datasets import Dataset

from support.training import made_once


@made_once
def prompts_with_feedback(count=12):
    """Plain prompts, some with a text for the teacher, and a number for the reward."""
    return Dataset.from_list(
        [
            {
                "prompt": "What color is " + "very " * (i % 3) + f"{i}?",
                "privileged_context": None if i % 3 == 1 else " " if i % 3 == 2 else f"It is not {i}.",
                "shade": i,
            }
            for i in range(count)
        ]
    )


@made_once
def chats_with_feedback(count=12):
    """The same as messages."""
    system = {"role": "system", "content": "Be brief."}
    rows = prompts_with_feedback(count)
    return Dataset.from_list([{**row, "prompt": [system, {"role": "user", "content": row["prompt"]}]} for row in rows])


def short(completion_ids, shade, **_):
    """1 for a completion of few tokens, more or fewer for each prompt; for some prompts there is none."""
    return [float(len(ids) < 3 + value % 4) for ids, value in zip(completion_ids, shade, strict=True)]


def third(completion_ids, **_):
    """A little more for completions of some tokens; nothing is said of others."""
    return [None if ids[0] % 5 == 0 else (ids[0] % 3) / 3 for ids in completion_ids]
