"""The order in which online methods read their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Yields rows so that each prompt meets its group, and each batch of prompts all steps that are made of it.

    One pass over the data is a permutation, cut into batches of prompts. Every batch comes `repeat_count` times before
    the next, and in it every row `mini_repeat_count` times in a row. With rows a to e, `mini_repeat_count=2`,
    `batch_size=2` and `repeat_count=2` a pass without shuffling is `aabb aabb ccdd ccdd`; a last batch that is not
    full, here `e`, is left out. The order is that of TRL's sampler, for the same seed.

    Args:
        data_source: the rows; only their number matters.
        mini_repeat_count: completions of one prompt.
        batch_size: different prompts of one generation.
        repeat_count: how often a generation's rows are read, the optimizer's passes over them times its slices.
        shuffle: whether each pass has its own permutation.
        seed: of the permutations, by a generator that nothing else draws from; None is the generator's default seed.

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
        self.generator = torch.Generator()
        if seed is not None:
            self.generator.manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        kept = self.num_samples - self.num_samples % self.batch_size
        if self.shuffle:
            rows = torch.randperm(self.num_samples, generator=self.generator)
        else:
            rows = torch.arange(self.num_samples)
        batches = rows[:kept].view(-1, 1, self.batch_size, 1)
        return iter(batches.expand(-1, self.repeat_count, -1, self.mini_repeat_count).flatten().tolist())

    def __len__(self) -> int:
        kept = self.num_samples - self.num_samples % self.batch_size
        return kept * self.mini_repeat_count * self.repeat_count


class WholeBatchSampler(Sampler[int]):
    """Yields rows in a new order each epoch, as many as fill whole batches; a run that is resumed goes on in order.

    Args:
        data_source: the rows; only their number matters.
        batch_size: rows of a batch.
        seed: of the orders.
        epoch: gives the number of the epoch that begins.

    Raises:
        ValueError: fewer rows than one batch.
    """

    def __init__(self, data_source: Sized, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        if len(data_source) < batch_size:
            raise ValueError(
                f"the dataset has {len(data_source)} rows, but one rollout takes {batch_size} prompts; use a larger "
                "dataset or a smaller batch"
            )
        self.data_source = data_source
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(torch.randperm(len(self.data_source), generator=generator)[: len(self)].tolist())

    def __len__(self) -> int:
        return len(self.data_source) - len(self.data_source) % self.batch_size


def repeat_stream(
    dataset: IterableDataset, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1
) -> IterableDataset:
    """A stream with its rows in the order in which RepeatSampler reads rows without shuffling."""
    counts = (mini_repeat_count, repeat_count)
    return dataset.map(
        _repeat, batched=True, batch_size=batch_size, drop_last_batch=True, fn_kwargs={"counts": counts}
    )


def _repeat(batch: dict[str, list], counts: tuple[int, int]) -> dict[str, list]:
    each, whole = counts
    return {name: [value for value in values for _ in range(each)] * whole for name, values in batch.items()}
