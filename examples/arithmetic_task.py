"""Makes the task of the online demos, sums and differences of two digits, and judges answers."""

from __future__ import annotations

import random

import reasoning_gym
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Give only the answer."
# Answers that the task has.
SMALLEST, LARGEST = -9, 18


def sums(train: int, held_out: int, seed: int) -> dict[str, Dataset]:
    """Returns sums and differences of two digits as conversations with answers; no question is in both splits."""
    source = reasoning_gym.create_dataset("chain_sum", size=4000, seed=seed, min_terms=2, max_terms=2, max_digits=1)
    rows = {
        entry["question"]: {
            "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": entry["question"]}],
            "completion": [{"role": "assistant", "content": entry["answer"]}],
            "answer": entry["answer"],
        }
        for entry in source
    }
    questions = sorted(rows)
    random.Random(seed).shuffle(questions)
    if len(questions) < train + held_out:
        raise ValueError(f"the task has {len(questions)} questions, {train} + {held_out} were asked for")
    splits = {"test": questions[:held_out], "train": questions[held_out : held_out + train]}
    return {name: Dataset.from_list([rows[question] for question in part]) for name, part in splits.items()}


def correct(completions: list[list[dict]], answer: list[str], **_: object) -> list[float]:
    """Returns 1 for the right answer and nothing else, else 0."""
    texts = [completion[0]["content"].strip() for completion in completions]
    return [float(text == expected) for text, expected in zip(texts, answer, strict=True)]


def answer_pairs(data: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Dataset:
    """Returns preference pairs: the right answer is chosen; another number, or words around it, are rejected.

    Each question has `count` pairs with different rejected answers. Prompts are texts, so that an answer ends with the
    EOS token and nothing behind it, as sampled ones do.
    """
    rng = random.Random(seed)
    pairs = []
    for row in data:
        right = row["answer"]
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        others = [str(number) for number in range(SMALLEST, LARGEST + 1) if str(number) != right]
        wordy = rng.choice([f"{right}.", f"= {right}", f"{right} {right}", f"The answer is {right}"])
        for wrong in [*rng.sample(others, count - 1), wordy]:
            pairs.append({"prompt": prompt, "chosen": right, "rejected": wrong})
    rng.shuffle(pairs)
    return Dataset.from_list(pairs)
