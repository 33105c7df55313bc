"""Defines findings, and the kinds of findings, that checks report."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# From harmless to harmful.
SEVERITIES = ("info", "warning", "error")


@dataclass(frozen=True)
class Kind:
    """Describes a kind of finding: its name in the JSON report, how bad it is, a title, and a remedy."""

    code: str
    severity: str
    title: str
    remedy: str


# What a check of one row yields: a kind and a detail, for everything it finds.
Hits = Iterator[tuple[Kind, str]]


@dataclass(frozen=True)
class Finding:
    """Tells where one kind of finding was made in one split.

    row_numbers: the rows it concerns, in order; total: the rows it could have concerned; detail: what more there is to
    say, of the first row or of the whole; measured_share: what to give as share in place of rows / total.
    """

    kind: Kind
    split: str
    row_numbers: Sequence[int]
    total: int
    detail: str = ""
    measured_share: float | None = None

    @property
    def severity(self) -> str:
        """Returns one of SEVERITIES."""
        return self.kind.severity

    @property
    def share(self) -> float:
        """Returns the share of rows that it concerns, from 0 to 1."""
        return len(self.row_numbers) / self.total if self.measured_share is None else self.measured_share

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding in JSON's types."""
        return {
            "finding": self.kind.code,
            "severity": self.severity,
            "title": self.kind.title,
            "split": self.split,
            "rows": len(self.row_numbers),
            "share": self.share,
            "detail": self.detail,
            "remedy": self.kind.remedy,
            "row_numbers": [int(row) for row in self.row_numbers],
        }


def quote(value: Any, limit: int = 40) -> str:
    """Returns a value as Python writes it, invisible characters escaped, in about `limit` characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 1] + "…")
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
