"""Makes preference pairs of reasoning-gym tasks, which score answers: right ones are chosen, wrong rejected."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym
from datasets import Dataset

INSTRUCTION = "Give only the answer."


@dataclass(frozen=True)
class Task:
    """Names a reasoning-gym task and its settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


TASKS = (
    Task("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 60}),
    Task("spell_backward", {"min_word_len": 4, "max_word_len": 7}),
)


def near_miss(answer: str, rng: random.Random) -> str:
    """Returns a wrong answer of the right kind: a number near the right one, or a word with letters exchanged."""
    if answer.lstrip("-").isdigit():
        return str(int(answer) + rng.choice([-20, -10, -3, -2, -1, 1, 2, 3, 10, 20]))
    if rng.random() < 0.5:
        return answer[::-1]
    place = rng.randrange(len(answer) - 1)
    return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]


def pairs_of_task(task: Task, count: int, seed: int) -> list[dict[str, Any]]:
    """Returns `count` pairs with different questions, each answer scored by the task: chosen 1.0, rejected less."""
    rng = random.Random(f"{task.name}-{seed}")
    source = reasoning_gym.create_dataset(task.name, size=20 * count + 100, seed=seed, **task.settings)
    pairs: dict[str, dict[str, Any]] = {}
    for entry in source:
        question, answer = entry["question"].strip(), str(entry["answer"])
        wrong = near_miss(answer, rng)
        is_pair = source.score_answer(answer, entry) == 1.0 and source.score_answer(wrong, entry) < 1.0
        if is_pair and wrong != answer and question not in pairs:
            pairs[question] = {
                "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": wrong}],
                "task": task.name,
            }
        if len(pairs) == count:
            return list(pairs.values())
    raise ValueError(f"task {task.name!r} has only {len(pairs)} different questions, {count} were asked for")


def preference_pairs(train: int, held_out: int, seed: int = 0, tasks: tuple[Task, ...] = TASKS) -> dict[str, Dataset]:
    """Returns conversational preference datasets "train" and "test", the tasks in equal shares, no question in both.

    The same seed gives the same rows.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for index, task in enumerate(tasks):
        shares = [size // len(tasks) + (index < size % len(tasks)) for size in (train, held_out)]
        pairs = pairs_of_task(task, sum(shares), seed)
        rows["train"] += pairs[: shares[0]]
        rows["test"] += pairs[shares[0] :]
    for split in rows.values():
        random.Random(seed).shuffle(split)
    return {name: Dataset.from_list(split) for name, split in rows.items()}
