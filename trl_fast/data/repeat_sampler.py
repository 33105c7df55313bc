"""Orders the prompts that online methods read."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Yields rows so that each prompt meets its group, and each batch of prompts all steps that are made of it.

    One pass over the data is a permutation, cut into batches of prompts. Every batch comes `repeat_count` times before
    the next, and in it every row `mini_repeat_count` times in a row. With rows a to e, `mini_repeat_count=2`,
    `batch_size=2` and `repeat_count=2` a pass without shuffling is `aabb aabb ccdd ccdd`; a last batch that is not
    full, here `e`, is left out.

    For the same seed the order is that of TRL's sampler: each epoch's is the next draw of a generator that is seeded
    once. Which draw that is depends on the epoch alone, so a resumed run goes on in order.

    Args:
        data_source: the rows; only their number matters.
        mini_repeat_count: completions of one prompt.
        batch_size: different prompts of one generation.
        repeat_count: how often a generation's rows are read, the optimizer's passes over them times its slices.
        shuffle: whether each epoch has its own permutation.
        seed: of the permutations; None is torch.Generator's default seed.

    Raises:
        ValueError: a count below 1, or fewer rows than one batch.
    """

    def __init__(
        self,
        data_source: Sized,
        mini_repeat_count: int,
        batch_size: int = 1,
        repeat_count: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        counts = {"mini_repeat_count": mini_repeat_count, "batch_size": batch_size, "repeat_count": repeat_count}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"RepeatSampler: {name} must be at least 1, got {count}")
        self.num_samples = len(data_source)
        if self.num_samples < batch_size:
            raise ValueError(
                f"RepeatSampler: the dataset has {self.num_samples} rows, but one generation takes {batch_size} "
                "different prompts; use a larger dataset, a smaller generation batch or more generations a prompt"
            )
        self.data_source = data_source
        self.mini_repeat_count = mini_repeat_count
        self.batch_size = batch_size
        self.repeat_count = repeat_count
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass; without it, passes count up from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        kept = self.num_samples - self.num_samples % self.batch_size
        batches = self._order()[:kept].view(-1, 1, self.batch_size, 1)
        self.epoch += 1
        return iter(batches.expand(-1, self.repeat_count, -1, self.mini_repeat_count).flatten().tolist())

    def _order(self) -> torch.Tensor:
        """Returns the numbers of all rows, (num_samples,), in the order of the present epoch."""
        rows = torch.arange(self.num_samples)
        if self.shuffle:
            generator = torch.Generator()
            if self.seed is not None:
                generator.manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                rows = torch.randperm(self.num_samples, generator=generator)
        return rows

    def __len__(self) -> int:
        kept = self.num_samples - self.num_samples % self.batch_size
        return kept * self.mini_repeat_count * self.repeat_count


def repeat_stream(
    dataset: IterableDataset, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1
) -> IterableDataset:
    """Returns a stream with its rows in the order in which RepeatSampler reads rows without shuffling."""
    counts = (mini_repeat_count, repeat_count)
    return dataset.map(
        _repeat, batched=True, batch_size=batch_size, drop_last_batch=True, fn_kwargs={"counts": counts}
    )


def _repeat(batch: dict[str, list], counts: tuple[int, int]) -> dict[str, list]:
    each, whole = counts
    return {name: [value for value in values for _ in range(each)] * whole for name, values in batch.items()}
