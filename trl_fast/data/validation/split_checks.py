"""Checks whole splits: repetitions, leaks, contradictions, and which lengths are preferred."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .findings import Finding, Kind
from .image_facts import ImageTable
from .preference_record import SIDES, Record
from .text_checks import main_script

# Any odd number: multiplying by it is a bijection of 64-bit numbers, here it tells (A, B) from (B, A).
_MIX = np.uint64(0x9E3779B97F4A7C15)
# Of a normal distribution, 95% lies within so many standard deviations.
_Z95 = 1.959964
LENGTH_COLUMNS = ("prompt", *SIDES)
# How far from one half a share may be before it is called a bias.
TOLERATED_BIAS = 0.1

REPEATED_ROW = Kind("repeated_row", "warning", "row repeats an earlier one", "Remove the repetitions.")
REPEATED_PROMPT = Kind(
    "repeated_prompt", "info", "prompt of an earlier row", "Fine if prompts are meant to have several responses."
)
LEAKED_ROW = Kind(
    "leaked_row",
    "error",
    "row is in another split too",
    "Remove it from one of the splits.",
)
LEAKED_PROMPT = Kind(
    "leaked_prompt",
    "error",
    "prompt is in another split too",
    "Split by prompt: evaluation needs unseen ones.",
)
CONTRADICTION = Kind(
    "label_conflict", "error", "contradictory preference", "Decide for one of the labels, or remove all of these rows."
)
BOTH_SIDES = Kind(
    "chosen_and_rejected",
    "warning",
    "response chosen in one row, rejected in another",
    "Fine if pairs were made from a ranking of several responses; else look for wrong labels.",
)
LENGTH_BIAS = Kind(
    "length_bias",
    "warning",
    "preference for a length",
    "Balance the lengths, or use a length-normalised or length-desensitised loss, and judge the result by length too.",
)
LENGTH_SHARE = Kind(
    "length_share",
    "info",
    "how often the longer response is preferred",
    f"A bias of more than {100 * TOLERATED_BIAS:.0f} points is not certain.",
)
LABEL_BALANCE = Kind(
    "label_balance", "info", "share of desirable responses", "Weigh the sides: desirable_weight, undesirable_weight."
)
ONE_LABEL = Kind("one_label", "warning", "all labels are equal", "Add responses of the other label.")


def _integers() -> array:
    return array("q")


@dataclass
class SplitTable:
    """Holds the few numbers of each readable row that checks of whole splits need, 56 bytes a row.

    unit: of lengths, characters or tokens; total: rows, also those that could not be read; scripts: by column, how
    many rows are mainly in each script; images: those of all rows. An unpaired row has its completion as chosen if it
    is desirable, as rejected if not.
    """

    name: str
    unit: str = "characters"
    paired: bool = True
    conversational: bool = False
    implicit_prompt: bool = False
    total: int = 0
    scripts: dict[str, Counter[str]] = field(default_factory=dict)
    images: ImageTable = field(default_factory=ImageTable)
    _rows: array = field(default_factory=_integers)
    _keys: array = field(default_factory=lambda: array("Q"))
    _lengths: dict[str, array] = field(default_factory=lambda: {column: _integers() for column in LENGTH_COLUMNS})

    def add(self, record: Record) -> None:
        """Enters a row."""
        self.paired, self.conversational = record.paired, record.conversational
        self.implicit_prompt = record.implicit_prompt
        self.images.add(record.images)
        self._rows.append(record.row)
        self._keys.extend(record.keys())
        names = {"completion": "chosen" if record.label else "rejected"}
        lengths = {names.get(column, column): length for column, length in _lengths(record, self.unit).items()}
        for column, values in self._lengths.items():
            values.append(lengths.get(column, -1))
        for column, characters in record.characters.items():
            self.scripts.setdefault(column, Counter())[main_script(characters) or "none"] += 1

    @property
    def rows(self) -> np.ndarray:
        """Returns the row numbers, int64."""
        return np.asarray(self._rows)

    @property
    def prompt_keys(self) -> np.ndarray:
        """Returns hashes of the prompts, uint64, 0 for none (see `Record.keys`)."""
        return np.asarray(self._keys)[0::3]

    @property
    def chosen_keys(self) -> np.ndarray:
        """Returns hashes of prompt + chosen, uint64, 0 for none."""
        return np.asarray(self._keys)[1::3]

    @property
    def rejected_keys(self) -> np.ndarray:
        """Returns hashes of prompt + rejected, uint64, 0 for none."""
        return np.asarray(self._keys)[2::3]

    @property
    def row_keys(self) -> np.ndarray:
        """Returns one hash a row, uint64, of its prompt and both sides."""
        return self.chosen_keys * _MIX + self.rejected_keys

    @property
    def reversed_row_keys(self) -> np.ndarray:
        """Returns the hash that each row would have with its sides exchanged."""
        return self.rejected_keys * _MIX + self.chosen_keys

    def lengths(self, column: str) -> np.ndarray:
        """Returns the lengths of a column's text (prompt, chosen or rejected), int64, -1 where there is none."""
        return np.asarray(self._lengths[column])

    def known_lengths(self, column: str) -> np.ndarray:
        """Returns the lengths of the texts that there are, int64."""
        lengths = self.lengths(column)
        return lengths[lengths >= 0]


def _lengths(record: Record, unit: str) -> dict[str, int]:
    if unit == "characters":
        return {column: len(text) for column, text in record.texts.items()}
    if record.tokens is None or record.tokens.failure:
        return {}
    ids = {"prompt": record.tokens.prompt, **record.tokens.completions}
    return {column: len(values) for column, values in ids.items()}


def repetitions(table: SplitTable) -> Iterator[Finding]:
    """Finds rows that an earlier row of the split equals, and other rows with an earlier row's prompt."""
    first = _first_equal(table.row_keys)
    repeats = first < np.arange(len(first))
    yield from _found(REPEATED_ROW, table, repeats, "equals row {}", table.rows[first])
    first = _first_equal(table.prompt_keys)
    again = (first < np.arange(len(first))) & ~repeats & (table.prompt_keys != 0)
    yield from _found(REPEATED_PROMPT, table, again, "prompt of row {}", table.rows[first])


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """Returns, for each key, the index of the first one that equals it."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first[group]


def _found(
    kind: Kind, table: SplitTable, mask: np.ndarray, detail: str = "", partner: np.ndarray | None = None
) -> Iterator[Finding]:
    """Yields the finding of the rows in `mask`, if any; `{}` in the detail becomes the first one's `partner`."""
    if mask.any():
        first = int(mask.argmax())
        text = detail.format(partner[first]) if partner is not None else detail
        yield Finding(kind, table.name, table.rows[mask].tolist(), table.total, text)


def leakage(tables: list[SplitTable]) -> Iterator[Finding]:
    """Finds rows of each split that an earlier split has too, and other rows whose prompt it has."""
    for index, table in enumerate(tables):
        for earlier in tables[:index]:
            leaked = np.isin(table.row_keys, earlier.row_keys)
            yield from _leak(LEAKED_ROW, table, earlier, leaked, table.row_keys, earlier.row_keys)
            leaked = np.isin(table.prompt_keys, earlier.prompt_keys) & ~leaked & (table.prompt_keys != 0)
            yield from _leak(LEAKED_PROMPT, table, earlier, leaked, table.prompt_keys, earlier.prompt_keys)


def _leak(
    kind: Kind, table: SplitTable, earlier: SplitTable, mask: np.ndarray, keys: np.ndarray, earlier_keys: np.ndarray
) -> Iterator[Finding]:
    if mask.any():
        row = earlier.rows[np.flatnonzero(earlier_keys == keys[mask][0])[0]]
        yield from _found(kind, table, mask, f"row {row} of {earlier.name}")


def label_conflicts(table: SplitTable) -> Iterator[Finding]:
    """Finds prompts with contradictory labels, and responses chosen in one row but rejected in another.

    Contradictory: A is preferred to B in one row and B to A in another, or a response has both labels.
    """
    chosen, rejected = table.chosen_keys, table.rejected_keys
    both = np.intersect1d(chosen[chosen != 0], rejected[rejected != 0])
    on_both_sides = (np.isin(chosen, both) | np.isin(rejected, both)) & (chosen != rejected)
    if not table.paired:
        yield from _found(CONTRADICTION, table, on_both_sides, "the response has both labels")
        return
    contradicted = np.isin(table.row_keys, table.reversed_row_keys) & (chosen != rejected)
    order = np.argsort(table.reversed_row_keys, kind="stable")
    place = np.searchsorted(table.reversed_row_keys[order], table.row_keys).clip(max=len(order) - 1)
    yield from _found(CONTRADICTION, table, contradicted, "reverse of row {}", table.rows[order[place]])
    yield from _found(BOTH_SIDES, table, on_both_sides & ~contradicted)


def length_bias(table: SplitTable) -> Iterator[Finding]:
    """Measures how often the longer response is the preferred one, ties left out, with its 95% interval.

    For unpaired rows: the probability that a desirable response is longer than an undesirable one, ties counted half.
    It is a warning where the whole interval is more than TOLERATED_BIAS away from one half.
    """
    chosen, rejected = (table.lengths(column) for column in SIDES)
    if table.paired:
        compared = (chosen != rejected) & (chosen >= 0) & (rejected >= 0)
        longer = compared & (chosen > rejected)
        count, total = int(longer.sum()), int(compared.sum())
        if total == 0:
            return
        share, interval, rows = count / total, wilson_interval(count, total), table.rows[longer].tolist()
        what = f"the longer one is chosen in {share:.1%} of {total:,} pairs of different length"
    else:
        desirable, undesirable = (table.known_lengths(column) for column in SIDES)
        total = len(desirable) + len(undesirable)
        if not len(desirable) or not len(undesirable):
            return
        share = probability_longer(desirable, undesirable)
        interval, rows = hanley_mcneil_interval(share, len(desirable), len(undesirable)), []
        what = f"a desirable response is longer than an undesirable one with probability {share:.1%}"
    biased = interval[0] > 0.5 + TOLERATED_BIAS or interval[1] < 0.5 - TOLERATED_BIAS
    detail = f"{what} (95% interval {interval[0]:.1%} to {interval[1]:.1%}, in {table.unit})"
    yield Finding(LENGTH_BIAS if biased else LENGTH_SHARE, table.name, rows, total, detail, share)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Computes the 95% score interval of a proportion.

    E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209–212.
    """
    share, z2 = successes / trials, _Z95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(center - half, 0.0), min(center + half, 1.0)


def probability_longer(first: np.ndarray, second: np.ndarray) -> float:
    """Computes the probability that a random entry of `first` exceeds one of `second`, ties counted half."""
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left") + np.searchsorted(ordered, first, side="right")
    return float(below.mean() / 2 / len(second))


def hanley_mcneil_interval(area: float, first: int, second: int) -> tuple[float, float]:
    """Computes the 95% interval of `probability_longer` of samples of these sizes.

    J. A. Hanley and B. J. McNeil, Radiology 143 (1982), 29–36, equation 1.
    """
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (first - 1) * (q1 - area**2) + (second - 1) * (q2 - area**2)
    half = _Z95 * math.sqrt(max(variance, 0.0) / (first * second))
    return max(area - half, 0.0), min(area + half, 1.0)


def label_balance(table: SplitTable) -> Iterator[Finding]:
    """Measures the share of desirable responses of unpaired rows, and warns if there is only one label."""
    if table.paired:
        return
    desirable = table.chosen_keys != 0
    if desirable.all() or not desirable.any():
        yield from _found(ONE_LABEL, table, np.ones_like(desirable), f"all are {bool(desirable[0])}")
    else:
        yield from _found(LABEL_BALANCE, table, desirable)


SPLIT_CHECKS = (repetitions, label_conflicts, length_bias, label_balance)
CROSS_CHECKS = (leakage,)
