"""Makes the loaders of a trainer: rows of training dealt by their cost, streams that are evaluated as datasets are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from datasets import IterableDataset

from .balancing import balanced
from .sequence_parallel import SharedRows
from .stream_loader import StreamLoader


def make_loader(trainer: Any, make: Callable[..., Any], **kwargs: Any) -> Iterable[Any]:
    """Returns the loader of a dataset.

    Args:
        trainer: a trainer of ours.
        make: `_get_dataloader` of transformers.Trainer.
        kwargs: its arguments.
    """
    dataset = kwargs["dataset"]
    if kwargs.get("is_training"):
        loader = balanced(make(**kwargs), trainer, dataset)
        return loader if trainer.sequence_group is None else SharedRows(loader, trainer.sequence_group)
    if not isinstance(dataset, IterableDataset):
        return make(**kwargs)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, kwargs["description"])
    return StreamLoader(dataset, kwargs["batch_size"], collate, trainer.args, trainer.accelerator)
