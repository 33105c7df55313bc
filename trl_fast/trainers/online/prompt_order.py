"""Orders training prompts: those of one generation together, each as often as it gets completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from trl_fast.data.repeat_sampler import RepeatSampler, repeat_stream


@dataclass(frozen=True)
class PromptOrder:
    """Describes the order of training prompts.

    Args:
        repeats: completions of a prompt, one after the other.
        prompts: different prompts of a generation, of all processes.
        rounds: how often a generation's prompts come, once for each micro-batch of its updates.
        batches: batches of a process that a data loader reads at a time, all rows of a generation.
        shuffle: whether prompts are shuffled, by `seed`.
    """

    repeats: int
    prompts: int
    rounds: int = 1
    batches: int = 1
    shuffle: bool = True
    seed: int = 0

    @classmethod
    def of_generations(cls, args: Any, completions: int) -> PromptOrder:
        """Returns the order of a config that generates several completions a prompt, for all updates on them.

        completions: those of a generation, of all processes.
        """
        return cls(
            repeats=args.num_generations,
            prompts=completions // args.num_generations,
            rounds=args.generate_every,
            batches=args.steps_per_generation,
            shuffle=bool(args.shuffle_dataset),
            seed=args.seed,
        )

    def sampler(self, dataset: Dataset) -> RepeatSampler:
        """Returns the sampler of a dataset."""
        return RepeatSampler(
            dataset,
            mini_repeat_count=self.repeats,
            batch_size=self.prompts,
            repeat_count=self.rounds,
            shuffle=self.shuffle,
            seed=self.seed,
        )

    def stream(self, dataset: IterableDataset) -> IterableDataset:
        """Returns a stream's prompts in this order."""
        dataset = dataset.shuffle(seed=self.seed) if self.shuffle else dataset
        return repeat_stream(dataset, self.repeats, self.prompts, self.rounds)
