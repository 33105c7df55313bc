"""Names the size of a problem of the head, for benchmarks that go through several."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Holds the size of a problem of the head: N rows, H hidden units, V tokens of the vocabulary."""

    rows: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.rows}/{self.hidden}/{self.vocab}"

    @property
    def pass_flops(self) -> int:
        """Returns the operations of one pass over N·V·H."""
        return 2 * self.rows * self.hidden * self.vocab


# The size at which the head is held to its bounds.
REFERENCE = Size(8192, 4096, 151936)


def parse_size(text: str) -> Size:
    """Returns a size from "N/H/V".

    Raises:
        ValueError: it is none.
    """
    parts = text.split("/")
    if len(parts) != len(Size._fields) or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"sizes: {text!r} is no size; expected rows/hidden/vocabulary such as {REFERENCE}")
    return Size(*map(int, parts))
