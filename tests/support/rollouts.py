"""Completions that are the same for every trainer: of a prompt, and of how often it came."""

from __future__ import annotations

import random
from collections import Counter

from datasets import Dataset

from support.training import made_once
from support.vision_processors import TEXT_TOKENS
from trl_fast.rollout import Rollout


@made_once
def color_prompts(count: int = 12) -> Dataset:
    """Plain prompts of different lengths, with a column for reward functions."""
    return Dataset.from_list(
        [{"prompt": "What color is " + "very " * (i % 3) + f"{i}?", "shade": i} for i in range(count)]
    )


class FixedRollout:
    """A `rollout_func`: random tokens, the share `ends` with the end token; the same again for the same prompts."""

    def __init__(self, tokenizer, longest: int = 7, with_mask: bool = False, ends: float = 0.7) -> None:
        self.tokenizer, self.longest, self.with_mask, self.ends = tokenizer, longest, with_mask, ends
        self.seen: Counter = Counter()

    @property
    def vocab_size(self) -> int:
        """Beyond the last token that is sampled."""
        return len(self.tokenizer)

    def tokens_of(self, prompt: object) -> list[int]:
        """The token ids of a prompt."""
        return self.tokenizer(text=prompt)["input_ids"]

    def completions(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """One for each prompt."""
        return [self._sample(ids)[0] for ids in prompt_ids]

    def _sample(self, prompt: list[int]) -> tuple[list[int], random.Random]:
        rng = random.Random(f"{prompt} {self.seen[tuple(prompt)]}")
        self.seen[tuple(prompt)] += 1
        ids = [rng.randrange(3, self.vocab_size) for _ in range(rng.randint(1, self.longest))]
        return ids + [self.tokenizer.eos_token_id] * (rng.random() < self.ends), rng

    def __call__(self, prompts: list[str], trainer: object) -> dict[str, list]:
        prompt_ids = [self.tokens_of(prompt) for prompt in prompts]
        output = {"prompt_ids": prompt_ids, "completion_ids": [], "logprobs": []}
        masks = []
        for prompt in prompt_ids:
            ids, rng = self._sample(prompt)
            output["completion_ids"].append(ids)
            output["logprobs"].append([-rng.random() for _ in ids])
            masks.append([1] + [int(rng.random() < 0.7) for _ in ids[1:]])
        return {**output, "env_mask": masks} if self.with_mask else output


class FixedImageRollout(FixedRollout):
    """The same for conversations with images, of which a processor makes tokens; completions have no image tokens."""

    vocab_size = TEXT_TOKENS

    def __init__(self, processor, **how) -> None:
        super().__init__(processor.tokenizer, **how)
        self.processor = processor

    def tokens_of(self, prompt: list) -> list[int]:
        """The token ids of a conversation."""
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        return self.processor.apply_chat_template([prompt], **options)["input_ids"][0]


def vowels(completions, **_):
    """How many vowels a completion has; none of the longest ones is rewarded at all."""
    return [None if len(text) > 60 else float(sum(letter in "aeiou" for letter in text)) for text in completions]


def brevity(completion_ids, shade, **_):
    """Shorter is better, by an amount that depends on the dataset's column."""
    return [-len(ids) * (1 + value % 2) / 4 for ids, value in zip(completion_ids, shade, strict=True)]


class FixedEngine:
    """A rollout engine with the completions of FixedRollout."""

    def __init__(self, tokenizer, longest: int = 7) -> None:
        self.rollout = FixedRollout(tokenizer, longest)

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, self.rollout.completions(prompt_ids))

    def sync_weights(self, model, step):
        pass
