"""Holds a batch that answers as a dict with TRL's keys, and stays in the trainer's own layout while nobody looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, ClassVar

import torch

from .packing import TokenBatch


class DictBatch:
    """Holds a batch that answers as the dict that TRL's collator of the method returns.

    While nobody looks in, it is the `TokenBatch` that the trainer's collator made, in whatever layout. Whoever reads
    an entry gets padded tensors, made at that moment; from then on the entries are what is trained on, so that what is
    changed, taken out or put in counts, as it does in TRL. Asking which keys there are is no look.

    It has a dict's methods and goes into a call as `model(**batch)`. It is no `Mapping` for isinstance: transformers
    and torch take those apart, entry by entry, for every step.
    """

    def __init__(self, batch: TokenBatch, collator: DictCollator) -> None:
        self._batch = batch
        self._collator = collator
        self._entries: dict[str, Any] | None = None

    @property
    def is_read(self) -> bool:
        """Says whether somebody has looked in, so that the entries are what counts."""
        return self._entries is not None

    @property
    def device(self) -> torch.device:
        """Returns where the tensors are."""
        return self._batch.input_ids.device

    def token_batch(self) -> TokenBatch:
        """Returns what the model runs on: the collator's own batch, or a padded one of the entries."""
        return self._batch if self._entries is None else self._collator.token_batch(self._entries)

    def holding(self, batch: TokenBatch) -> DictBatch:
        """Returns a batch that answers as this one does, and holds another."""
        return DictBatch(batch, self._collator)

    def copy(self) -> dict[str, Any]:
        """Returns the entries as a dict, which is no look: changing it changes nothing here."""
        return self._collator.entries(self._batch) if self._entries is None else dict(self._entries)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DictBatch:
        """Returns the same batch with every tensor on `device`; itself if they are there, as a tensor does."""
        if self.device == torch.device(device):
            return self
        return self._moved(
            lambda batch: batch.to(device, non_blocking=non_blocking),
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> DictBatch:
        """Returns the same batch with every tensor in pinned memory (called by torch's DataLoader)."""
        return self._moved(TokenBatch.pin_memory, torch.Tensor.pin_memory)

    def _moved(
        self, move_batch: Callable[[TokenBatch], TokenBatch], move: Callable[[torch.Tensor], torch.Tensor]
    ) -> DictBatch:
        moved = DictBatch(move_batch(self._batch), self._collator)
        if self._entries is not None:
            moved._entries = {
                name: move(value) if isinstance(value, torch.Tensor) else value
                for name, value in self._entries.items()
            }
        return moved

    # ---- a dict's methods

    def _read(self) -> dict[str, Any]:
        if self._entries is None:
            self._entries = self._collator.entries(self._batch)
        return self._entries

    def _names(self) -> tuple[str, ...]:
        return self._collator.names(self._batch) if self._entries is None else tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._read()[name] = value

    def __delitem__(self, name: str) -> None:
        del self._read()[name]

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.copy(), **other}

    def keys(self) -> KeysView[str]:
        """Returns the keys."""
        return dict.fromkeys(self._names()).keys()

    def values(self) -> ValuesView[Any]:
        """Returns the padded tensors."""
        return self._read().values()

    def items(self) -> ItemsView[str, Any]:
        """Returns keys and padded tensors."""
        return self._read().items()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the entry of that name, or `default`."""
        return self._read()[name] if name in self else default

    def pop(self, name: str, *default: Any) -> Any:
        """Takes the entry of that name out and returns it, or the default.

        Raises:
            KeyError: there is neither.
        """
        return self._read().pop(name, *default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Returns the entry of that name, and makes it if there is none."""
        return self._read().setdefault(name, default)

    def update(self, *others: Any, **entries: Any) -> None:
        """Puts in the entries of a mapping or of pairs, and those named."""
        self._read().update(*others, **entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._names())})"


class DictCollator(ABC):
    """Collates prepared rows into a `DictBatch`; a subclass knows both shapes of its method's batches.

    layout: that of `collate`. lays_out_entries: whether `token_batch` makes it of entries too, instead of padded rows.
    """

    layout: str
    lays_out_entries: ClassVar[bool] = False

    def __call__(self, examples: list[dict[str, Any]]) -> DictBatch:
        """Returns the rows' batch."""
        return DictBatch(self.collate(examples), self)

    @abstractmethod
    def collate(self, examples: list[dict[str, Any]]) -> TokenBatch:
        """Returns the rows' batch in the layout that the model runs best."""

    @abstractmethod
    def names(self, batch: TokenBatch) -> tuple[str, ...]:
        """Returns the keys of `entries`, in their order."""

    @abstractmethod
    def entries(self, batch: TokenBatch) -> dict[str, Any]:
        """Returns what TRL's collator makes of the same rows."""

    @abstractmethod
    def token_batch(self, entries: Mapping[str, Any]) -> TokenBatch:
        """Returns the batch of such entries, whoever made them, in padded rows.

        Raises:
            ValueError: an entry is missing, or there is one that the loss does not read; names them.
        """


# What TRL's own trainers put into a batch for the model; it changes no loss.
_FOR_THE_MODEL = {"use_cache", "return_dict"}


def check_entries(entries: Mapping[str, Any], needed: set[str], optional: set[str]) -> None:
    """Checks that a batch has the entries that a loss reads, and none that it would leave unread.

    Raises:
        ValueError: it is otherwise; names the entries.
    """
    missing, unread = sorted(needed - set(entries)), sorted(set(entries) - needed - optional - _FOR_THE_MODEL)
    if missing:
        raise ValueError(
            f"The batch has {sorted(entries)}, but the loss reads {', '.join(map(repr, missing))} too; let "
            "data_collator return them, or compute the loss without super().compute_loss"
        )
    if unread:
        raise ValueError(
            f"The batch has {', '.join(map(repr, unread))}, which the loss does not read; take them out in "
            f"compute_loss before super().compute_loss is called. It reads {', '.join(sorted(needed | optional))}"
        )
