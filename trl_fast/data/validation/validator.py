"""Reads datasets once, row by row, and runs every check."""

from collections.abc import Callable, Mapping
from functools import partial

from datasets import Dataset, IterableDataset
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_fast.console import make_console, progress_columns

from ..dataset_types import AnyDataset
from ..images.columns import has_images, with_encoded_images
from ..images.reader import ImageReader
from .findings import SEVERITIES, Finding, Kind
from .image_checks import IMAGE_CHECKS, image_token_ids
from .message_checks import CONVERSATION_CHECKS
from .preference_record import Context, check_columns, make_record, read_slices
from .report import ValidationReport
from .split_checks import CROSS_CHECKS, SPLIT_CHECKS, SplitTable
from .text_checks import CONTENT_CHECKS
from .token_checks import TOKEN_CHECKS, tokenize

# To add a check: write a function of (record, context) that yields (kind, detail), or one of the table of a split or
# of all tables that yields findings, and enter it in the tuple at the end of its module.
ROW_CHECKS = (*CONTENT_CHECKS, *CONVERSATION_CHECKS, *TOKEN_CHECKS, *IMAGE_CHECKS)

MALFORMED = Kind(
    "malformed_row", "error", "row cannot be read", "Mend or remove the rows; training stops at the first of them."
)


def validate(
    dataset: AnyDataset | Mapping[str, AnyDataset],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    max_length: int | None = None,
    progress: bool = False,
) -> ValidationReport:
    """Looks for faults in preference data.

    dataset: one split (called "train" in the report), or a mapping of names to splits, such as a DatasetDict; rows
    have `chosen` and `rejected`, with or without a `prompt`, or `prompt`, `completion` and `label`, as text or as
    messages; and images. Splits are compared with those before them. tokenizer: measures lengths, renders the chat
    template and knows the special tokens; a model's processor where there are images. max_length: tokens of prompt +
    response that training keeps. progress: show a bar on standard error.

    Every row is read once; the cost grows linearly with the text.

    Raises TypeError if `dataset` is none of these, ValueError if a split has no rows, not the columns, or not a single
    row that can be read, if there is a max_length without a tokenizer, and for a tokenizer where there are images.
    """
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    for name, split in splits.items():
        if not isinstance(split, Dataset | IterableDataset):
            raise TypeError(f"dataset {name!r} is a {type(split).__name__}; expected a Dataset or an IterableDataset.")
    if not splits:
        raise ValueError("dataset has no splits; expected at least one.")
    if max_length is not None and (tokenizer is None or max_length < 1):
        raise ValueError(f"max_length={max_length}: expected a positive number, and a tokenizer to count tokens with.")
    splits = {name: with_encoded_images(split) for name, split in splits.items()}
    context = _context(tokenizer, max_length, any(map(has_images, splits.values())))
    tables: list[SplitTable] = []
    findings: list[Finding] = []
    with Progress(*progress_columns(), console=make_console(stderr=True), disable=not progress) as bar:
        for name, split in splits.items():
            total = len(split) if isinstance(split, Dataset) else None
            task = bar.add_task(name, total=total)
            table, found = _read_split(split, name, context, partial(bar.advance, task))
            tables.append(table)
            findings += found
    for check in SPLIT_CHECKS:
        findings += [finding for table in tables for finding in check(table)]
    for compare in CROSS_CHECKS:
        findings += compare(tables)
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    settings = {"max_length": max_length, "tokenizer": getattr(tokenizer, "name_or_path", None)}
    return ValidationReport(findings, tables, settings)


def _context(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None, max_length: int | None, reads_images: bool
) -> Context:
    if isinstance(tokenizer, ProcessorMixin):
        reader = ImageReader(tokenizer)
        return Context(reader.tokenizer, max_length, reader if reads_images else None)
    if tokenizer is not None and reads_images:
        raise ValueError("The dataset has images: give the model's processor as tokenizer, or None.")
    return Context(tokenizer, max_length)


def _read_split(
    dataset: AnyDataset, name: str, context: Context, advance: Callable[[int], None]
) -> tuple[SplitTable, list[Finding]]:
    """Returns a split's table and the findings in single rows; `advance` hears how many rows were read."""
    # Whatever format the rows are set to come in: the checks know Python's.
    dataset = dataset.with_format(None)
    table = SplitTable(name, unit="characters" if context.tokenizer is None else "tokens")
    # The rows of each kind, and the first one's detail.
    hits: dict[Kind, tuple[list[int], str]] = {}
    for examples in read_slices(dataset, check_columns(dataset, name)):
        records = []
        for row, example in enumerate(examples, start=table.total):
            try:
                records.append(make_record(example, row, name))
            except ValueError as error:
                hits.setdefault(MALFORMED, ([], str(error)))[0].append(row)
        if context.image_reader is not None:
            for record in records:
                record.tokens = image_token_ids(record, context.image_reader)
        elif context.tokenizer is not None:
            tokenize(records, context.tokenizer)
        for record in records:
            table.add(record)
            for check in ROW_CHECKS:
                for kind, detail in check(record, context):
                    rows = hits.setdefault(kind, ([], detail))[0]
                    if record.row not in rows[-1:]:
                        rows.append(record.row)
        table.total += len(examples)
        advance(len(examples))
    if len(table.rows) == 0:
        raise ValueError(hits[MALFORMED][1])
    return table, [Finding(kind, name, rows, table.total, detail) for kind, (rows, detail) in hits.items()]
