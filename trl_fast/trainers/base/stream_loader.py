"""Loads streams for evaluation: their batches and metrics are those of a dataset of the same rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from datasets import IterableDataset
from torch.utils.data import DataLoader

from trl_fast.data import TokenBatch
from trl_fast.parallel.agreement import process_count, while_all_have

from .config import BaseConfig

logger = logging.getLogger(__name__)


def forbid_dispatching(args: BaseConfig) -> None:
    """Lets each process read its own batches of a stream; says so if the arguments want them dispatched by one."""
    if args.accelerator_config.dispatch_batches:
        logger.warning(
            "accelerator_config: dispatch_batches=True has no effect. It would cut a batch into parts and put them "
            "together again, but a batch here is one object; each process reads its own."
        )
    args.accelerator_config.dispatch_batches = False


class _CountedRows(torch.utils.data.IterableDataset):
    """Yields a stream's rows in their order, whatever files they are of; its length is that of the pass so far."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = rows
        # Shared with a worker, which does the reading.
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._count.zero_()
        for row in self.rows:
            self._count += 1
            yield row

    def __len__(self) -> int:
        return self._count.item()


class StreamLoader:
    """Yields batches of `batch_size` rows of a stream for each process in turn, in the order of its rows.

    Where the last ones are filled up with the stream's first rows, accelerate is told how many rows are new, as it
    knows by itself of a dataset that tells its length: no row counts twice, and a smaller batch counts for less.
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], TokenBatch],
        args: BaseConfig,
        accelerator: Accelerator,
    ) -> None:
        self.dataset = _CountedRows(dataset)
        loader = DataLoader(
            self.dataset,
            batch_size=batch_size,
            collate_fn=collate,
            # Several would read different files, and each end with a batch that is not full.
            num_workers=min(args.dataloader_num_workers, 1),
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            drop_last=args.dataloader_drop_last,
        )
        self._loader = accelerator.prepare(loader)
        self._batch_of_all = batch_size * (1 if accelerator.split_batches else accelerator.num_processes)
        self._drops_last = args.dataloader_drop_last

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if self._loader.end_of_dataloader and not self._drops_last:
                self._loader.remainder = len(self.dataset) % self._batch_of_all
            yield batch


def in_step(batches: Iterator[Any], dataset: Any) -> Iterator[Any]:
    """Returns the batches of this process, as many as all processes have.

    Of a stream with a part for each process, accelerate has each process read its own ones, and some end earlier: the
    epoch then ends for all. A process that went on would wait for the others without end.
    """
    reads_own_parts = isinstance(dataset, IterableDataset) and dataset.n_shards >= process_count() > 1
    return while_all_have(batches) if reads_own_parts else batches
