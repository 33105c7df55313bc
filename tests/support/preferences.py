"""Random tokenized preference pairs and per-token scores to go with them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch


def random_pairs(
    count: int, seed: int = 0, longest: int = 9, vocab_size: int = 50, empty_prompts: bool = False
) -> list[dict[str, list[int]]]:
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids` of random lengths, completions never empty."""
    rng = random.Random(seed)

    def tokens(shortest: int) -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(rng.randint(shortest, longest))]

    return [
        {
            "prompt_ids": [] if empty_prompts and rng.random() < 0.5 else tokens(1),
            "chosen_ids": tokens(1),
            "rejected_ids": tokens(1),
        }
        for _ in range(count)
    ]


def random_scores(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Plausible per-token scores (count,); the log-probabilities require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=dtype)

    return SimpleNamespace(
        logprobs=(-3 * uniform()).requires_grad_(),
        entropy=2 * uniform(),
        log_sum_sq_probs=-2 * uniform(),
        mean_logits=uniform() - 0.5,
        is_top1=uniform() > 0.5,
    )
