"""Knows the formats of data files, and finds the place at which a file that could not be read is broken."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from trl_fast.input_errors import error_line

# File endings and the builder of `datasets` that reads them; each may be followed by .gz, but for Parquet and Arrow.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".jsonl", ".json", ".csv")
_NO_OBJECT = 'expected an object such as {"prompt": "..."}, got '
ENDINGS = ", ".join([*BUILDERS, *(f"{ending}.gz" for ending in _COMPRESSED)])


def builder_of(file: Path) -> str | None:
    """Returns the builder of `datasets` that reads a file, by the ending of its name; None for another ending."""
    if file.suffix == ".gz":
        ending = file.with_suffix("").suffix
        return BUILDERS[ending] if ending in _COMPRESSED else None
    return BUILDERS.get(file.suffix)


def split_name(file: Path) -> str:
    """Returns the split that a file of a folder holds: its name without endings."""
    return file.with_suffix("").stem if file.suffix == ".gz" else file.stem


@contextlib.contextmanager
def without_error_logs() -> Iterator[None]:
    """Drops the errors that `datasets` logs before it raises them."""

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    handlers = logging.getLogger("datasets").handlers
    for handler in handlers:
        handler.addFilter(is_no_error)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_no_error)


def find_fault(files: list[Path]) -> str | None:
    """Returns where the first broken one of some files is broken, and how, in one line; None if none is found.

    The files are read again, so this is for when reading them has failed.
    """
    for file in files:
        if file.stat().st_size == 0:
            return f"{file} is empty"
        try:
            fault = _FAULTS[builder_of(file) or ""](file)
        except (OSError, EOFError, zlib.error) as error:
            fault = f": cannot be read to its end: {error_line(error)}"
        if fault is not None:
            return f"{file}{fault}"
    return None


def _open(file: Path) -> IO[bytes]:
    """Opens a file, a compressed one as what is in it."""
    with file.open("rb") as start:
        compressed = start.read(2) == b"\x1f\x8b"
    if file.suffix == ".gz" and not compressed:
        raise gzip.BadGzipFile("its name ends in .gz, but it is not compressed")
    opened: Any = gzip.open(file) if compressed else file.open("rb")  # noqa: SIM115 (the caller closes it)
    return opened


def _text_fault(file: Path) -> str | None:
    """Returns what keeps a file from being UTF-8 text."""
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return " is UTF-16; save it as UTF-8"
            if b"\x00" in line:
                return f", line {number}: holds a zero byte, so it is no text"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}: byte 0x{line[error.start]:02x} is no UTF-8; save the file as UTF-8"
    return None


def _json_fault(file: Path) -> str | None:
    fault = _text_fault(file)
    if fault is not None:
        return fault
    with _open(file) as stream:
        is_list = stream.read(100).decode("utf-8-sig", errors="ignore").lstrip().startswith("[")
    return _json_list_fault(file) if is_list else _json_lines_fault(file)


def _json_lines_fault(file: Path) -> str | None:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            text = line.decode("utf-8-sig").strip()
            try:
                value = json.loads(text) if text else {}
            except json.JSONDecodeError as error:
                return f", line {number}, column {error.colno}: no valid JSON: {error.msg}"
            if not isinstance(value, dict):
                return f", line {number}: {_NO_OBJECT}{type(value).__name__}"
    return None


def _json_list_fault(file: Path) -> str | None:
    with _open(file) as stream:
        text = stream.read().decode("utf-8-sig")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return f", line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}"
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            return f", row {number}: {_NO_OBJECT}{type(value).__name__}"
    return None


def _csv_fault(file: Path) -> str | None:
    fault = _text_fault(file)
    if fault is not None:
        return fault
    import pandas

    try:
        with pandas.read_csv(file, chunksize=10_000) as chunks:
            for _ in chunks:
                pass
    except ValueError as error:
        return f": no valid CSV: {error_line(error)}"
    return None


def _parquet_fault(file: Path) -> str | None:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            for _ in opened.iter_batches():
                pass
    except (pyarrow.ArrowException, OSError) as error:
        return f": no valid Parquet: {error_line(error)}"
    return None


def _arrow_fault(file: Path) -> str | None:
    import pyarrow

    with file.open("rb") as stream:
        try:
            for _ in pyarrow.ipc.open_stream(stream):
                pass
        except (pyarrow.ArrowException, OSError) as error:
            return f": no valid Arrow: {error_line(error)}"
    return None


# The finder of faults for each builder; files of other endings are not looked through.
_FAULTS = {
    "json": _json_fault,
    "csv": _csv_fault,
    "parquet": _parquet_fault,
    "arrow": _arrow_fault,
    "": lambda file: None,
}
