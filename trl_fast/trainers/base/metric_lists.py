"""Shows the metrics that wait for the next log as TRL's trainers keep them: a list of numbers by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence
from typing import Any

import torch

from .metric_buffer import MetricBuffer


class MetricLists(MutableMapping[str, Any]):
    """Reads and writes a buffer as a dict of lists; a name that is not there has an empty list.

    `lists["name"].append(0.5)` is logged as the buffer's own values are.
    """

    def __init__(self, buffer: MetricBuffer) -> None:
        self._pairs = buffer.pairs

    def __getitem__(self, name: str) -> _Values:
        return _Values(self._pairs, name)

    def __setitem__(self, name: str, values: Iterable[Any]) -> None:
        # A list of the buffer itself is read before it is emptied.
        pairs = [_pair(value) for value in values]
        if pairs or name in self._pairs:
            self._pairs[name] = pairs

    def __delitem__(self, name: str) -> None:
        del self._pairs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._pairs

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return repr({name: list(self[name]) for name in self})


class _Values(MutableSequence[Any]):
    """Reads and writes the values of one name."""

    def __init__(self, pairs: MutableMapping[str, list[torch.Tensor]], name: str) -> None:
        self._pairs, self._name = pairs, name

    @property
    def _list(self) -> list[torch.Tensor]:
        return self._pairs.get(self._name, [])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [_value(pair) for pair in self._list[index]]
        return _value(self._list[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._list[index] = [_pair(item) for item in value] if isinstance(index, slice) else _pair(value)

    def __delitem__(self, index: Any) -> None:
        del self._list[index]

    def __len__(self) -> int:
        return len(self._list)

    def insert(self, index: int, value: Any) -> None:
        """Puts a number before the value at `index`."""
        self._pairs.setdefault(self._name, []).insert(index, _pair(value))

    def __repr__(self) -> str:
        return repr(list(self))


def _pair(value: Any) -> torch.Tensor:
    """Returns a number as the buffer keeps it, (2,) float32: a total and a count."""
    total = value.detach().float() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    return torch.stack((total, torch.ones_like(total)))


def _value(pair: torch.Tensor) -> float:
    total, count = pair.tolist()
    return total / max(count, 1)
