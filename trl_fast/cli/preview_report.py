"""Prints previewed examples, how they stand in the rows of a batch, and a summary of the dataset."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_fast.data import TokenBatch
from trl_fast.data.segments import segments_of, sequences_of
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from .preview_examples import DROPPED_BECAUSE, Example, Examples, Part
from .preview_tokens import CUT, LEARNED, ShownToken, TokenTexts, legend, token_lines

# Parts and rows of a packed row that are shown.
_PARTS = 6
_DRAWING_WIDTH = 48


@dataclass(frozen=True)
class Report:
    """Holds what is shown.

    - `row`, `found`: the number of a row, and its examples; none if it is dropped.
    - `shown_tokens`: parts with more tokens lose their middle; None: they do not.
    """

    examples: Examples
    row: int
    found: list[Example]
    shown_tokens: int | None

    @property
    def title(self) -> str:
        """Returns the method and which row it is."""
        return f"{self.examples.method}: {'packed row' if self.examples.is_packed else 'row'} {self.row}"

    @property
    def dropped(self) -> str:
        """Returns why the row is dropped."""
        reason = DROPPED_BECAUSE.get(self.examples.method, "it is cut away")
        return f"Row {self.row} is dropped: {reason}={self.examples.args.max_length}."

    @functools.cached_property
    def summary(self) -> list[str | Table]:
        """Returns what is said of all rows."""
        return [*_summary(self.examples)]

    def parts(self, example: Example) -> Iterator[tuple[str, list[tuple[list[ShownToken], int]]]]:
        """Yields the heading of each part that is shown, and its tokens in pieces, as `_pieces` does."""
        texts = TokenTexts(self.examples.tokenizer)
        for part in example.parts[:_PARTS]:
            tokens = texts.shown(part.ids, part.kinds, part.images)
            yield _heading(part, self.examples), [*_pieces(tokens, self.shown_tokens)]
        if len(example.parts) > _PARTS:
            yield f"... and {len(example.parts) - _PARTS} more in this row", []


def show(console: Console, report: Report) -> None:
    """Prints the examples of a row and the summary."""
    for example in report.found:
        console.rule(report.title, align="left", characters="─")
        for heading, pieces in report.parts(example):
            _show_part(console, heading, pieces)
        console.print(legend(coloured=_has_colours(console)))
        console.print()
        show_layout(console, report.examples, example)
    if not report.found:
        console.print(report.dropped)
    console.rule("summary", align="left", characters="─")
    show_summary(console, report)


def show_summary(console: Console, report: Report) -> None:
    """Prints what is said of all rows."""
    for line in report.summary:
        console.print(line)
    console.print("No weights were loaded. `trl-fast validate` looks for faults in preference data.", style="dim")


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


# ---- an example


def left_out_line(count: int) -> str:
    """Returns what stands where tokens are left out."""
    return f"... {count:,} tokens are left out here ..."


def _show_part(console: Console, heading: str, pieces: list[tuple[list[ShownToken], int]]) -> None:
    console.print(heading, style="bold")
    coloured = _has_colours(console)
    for tokens, left_out in pieces:
        if left_out:
            console.print(f"  {left_out_line(left_out)}", style="dim italic")
        for line in token_lines(tokens, console.width - 2, coloured=coloured):
            console.print(Text("  ").append_text(line), soft_wrap=True)


def _heading(part: Part, examples: Examples) -> str:
    learned, cut = part.kinds.count(LEARNED), part.kinds.count(CUT)
    count = f"{part.kept:,} of {len(part.ids):,}" if cut else f"{len(part.ids):,}"
    said = [f"{count} token{'' if len(part.ids) == 1 else 's'}"]
    if part.kept:
        said.append(f"positions {part.position}-{part.position + part.kept - 1}")
    if examples.method == "reward":
        learned = 0
    elif not examples.is_online:
        said.append("not learned" if not learned else f"{learned:,} learned" if learned < part.kept else "learned")
    if cut:
        said.append(_cut(part, examples))
    return f"{part.name}: {', '.join(said)}" + (f"; {part.note}" if part.note else "")


def _cut(part: Part, examples: Examples) -> str:
    first = next((index for index, kind in enumerate(part.kinds) if kind != CUT), len(part.kinds))
    last = len(part.kinds) - part.kept - first
    ends = [f"{count:,} cut off its {end}" for count, end in ((first, "beginning"), (last, "end")) if count]
    own = "max_prompt_length" if part.name == "prompt" else "max_completion_length"
    limit = getattr(examples.args, own, None)
    because = [f"{own}={limit}"] if limit is not None and limit < len(part.ids) else []
    if part.kept < min(limit or len(part.ids), len(part.ids)):
        because.append(f"max_length={examples.args.max_length}")
    return f"{' and '.join(ends)} by {', '.join(because)}"


def _pieces(tokens: list[ShownToken], limit: int | None) -> Iterator[tuple[list[ShownToken], int]]:
    """Yields runs of tokens to show, with how many are left out before them.

    Of a part with more tokens than the limit the beginning, the end, and where it is cut are shown.
    """
    count = len(tokens)
    if limit is None or count <= limit:
        yield tokens, 0
        return
    each = max(1, limit // 4)
    cut = [token.kind == CUT for token in tokens]
    changes = [index for index in range(1, count) if cut[index] != cut[index - 1]]
    shown = {*range(2 * each), *range(count - 2 * each, count)}
    for change in changes:
        shown |= {*range(max(0, change - each // 2), min(count, change + each // 2))}
    start, left_out = 0, 0
    while start < count:
        end = start
        while end < count and (end in shown) == (start in shown):
            end += 1
        if start in shown:
            yield tokens[start:end], left_out
        else:
            left_out = sum(token.count for token in tokens[start:end])
        start = end


# ---- rows of a batch


def show_layout(console: Console, examples: Examples, example: Example) -> None:
    """Prints how an example stands in the rows of a batch."""
    if example.batch is None:
        _show_completions(console, examples, example)
        return
    batch, layout = example.batch, BATCH_LAYOUTS[examples.layout]
    total, width = batch.input_ids.numel(), max(batch.input_ids.shape[1], 1)
    rows = "1 row" if len(batch.input_ids) == 1 else f"{len(batch.input_ids)} rows"
    shared = any(segment.is_continued for segment in segments_of(batch.tree_lengths or ()))
    what = "what turns begin alike with" if examples.has_turns else "the prompt"
    shares = f", {what} once" if shared else ""
    console.print(f"Alone in a batch ({layout.name}): {rows} of {width:,} tokens{shares}")
    segments = list(_segments(batch, example.names))
    for name, start, end, position in segments[: 2 * _PARTS]:
        left, right = (round(_DRAWING_WIDTH * place / width) for place in (start, end))
        filled = max(right - left, 1 if end > start else 0)
        bar = " " * left + "█" * filled + " " * (_DRAWING_WIDTH - left - filled)
        where = f"{position}-{position + end - start - 1}" if end > start else "none"
        console.print(f"  {name:12.12}│{bar}│ {where}", soft_wrap=True)
    if len(segments) > 2 * _PARTS:
        console.print(f"  ... and {len(segments) - 2 * _PARTS} more", style="dim")
    kept = batch.num_tokens
    if total < kept:
        console.print(f"  {kept - total:,} of {kept:,} tokens need not be computed: {what} is shared.")
    console.print()


def _segments(batch: TokenBatch, names: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yields what stands in the rows: name, first and last + 1 cell of its row, first position."""
    if batch.tree_lengths is None:
        assert batch.attention_mask is not None  # the padded layout has one
        for name, length in zip(names, batch.attention_mask.sum(1).tolist(), strict=False):
            yield name, 0, length, 0
        return
    segments, ends = segments_of(batch.tree_lengths), {path[-1] for path in sequences_of(batch.tree_lengths)}
    left = iter([*names, *["padding"] * len(ends)])
    for number, segment in enumerate(segments):
        name = next(left) if number in ends else "prompt" if segment.depth == 0 else "shared"
        yield name, segment.start, segment.end, segment.offset


def _show_completions(console: Console, examples: Examples, example: Example) -> None:
    args, length = examples.args, example.parts[0].kept
    limit = getattr(args, examples.trainer.length_setting)
    count = getattr(args, "num_generations", 1)
    many = "A completion" if count == 1 else f"{count} completions"
    console.print(f"{many} of at most {limit} tokens will be sampled here: {length + limit:,} tokens at most each.")
    together = min(count, args.per_device_train_batch_size)
    if BATCH_LAYOUTS[examples.layout].shares_prompts and together > 1:
        console.print(
            f"batch_layout={examples.layout}: the prompt stands once for up to {together} of them, which saves "
            f"{length * (together - 1):,} tokens of every forward pass."
        )
    console.print()


# ---- the summary


def _summary(examples: Examples) -> Iterator[str | Table]:
    table = Table(title=None, show_edge=False, pad_edge=False)
    for title in ("tokens before cutting", "min", "median", "95%", "largest"):
        table.add_column(title, justify="left" if title.startswith("tokens") else "right")
    for name, lengths in examples.lengths().items():
        numbers = (min(lengths), np.median(lengths), np.percentile(lengths, 95), max(lengths))
        table.add_row(name, *(f"{int(number):,}" for number in numbers))
    yield table
    before, after, learned = examples.tokens_of_rows()
    yield _rows_line(examples)
    kept = sum(after.values())
    if examples.is_packed:
        yield f"Packed into {len(examples.prepared):,} rows: {kept:,} of {sum(before.values()):,} tokens are kept."
    else:
        yield from _cut_lines(examples, before, after)
    if examples.method == "reward":
        yield f"Rewards are read at {learned:,} of {kept:,} tokens."
    elif not examples.is_online:
        share = learned / kept if kept else 0
        yield f"Learned: {learned:,} of {kept:,} tokens ({share:.1%})."
    if not examples.is_online:
        yield _saved_line(examples)


def _rows_line(examples: Examples) -> str:
    total = "" if examples.total is None else f" of {examples.total:,}"
    which = "all" if examples.rows == examples.total else "the dataset's first"
    return f"Rows looked at: {examples.rows:,}{total}, {which}."


def _cut_lines(examples: Examples, before: dict[int, int], after: dict[int, int]) -> Iterator[str]:
    dropped = examples.dropped
    if dropped:
        reason = DROPPED_BECAUSE[examples.method]
        yield f"Rows dropped: {len(dropped):,}, {reason}={examples.args.max_length} (first: row {dropped[0]})."
    cut = {row: before[row] - count for row, count in after.items() if before[row] > count}
    if cut:
        first = min(cut)
        yield f"Rows cut: {len(cut):,}, which lose {sum(cut.values()):,} tokens (first: row {first})."
    if not dropped and not cut:
        yield "Rows cut or dropped: none."


def _saved_line(examples: Examples) -> str:
    size = examples.args.per_device_train_batch_size
    ours = padded = 0
    for batch, in_padded_rows in examples.batches(size):
        ours += batch.input_ids.numel()
        padded += in_padded_rows.input_ids.numel()
    saved = 1 - ours / padded if padded else 0
    said = f"{saved:.0%} fewer than the {padded:,} of padded rows" if ours < padded else "as many as in padded rows"
    return f"In batches of {size}, batch_layout={examples.layout}: {ours:,} tokens in all, {said}."
