"""Where rows come from: JSONL, JSON, CSV and Parquet files, hub datasets, folders laid out or saved like one.

Everything is read row by row, so that a stream and a whole read share one path and one numbering.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pat_serve.errors import DataError, first_line
from pat_serve.terminal.progress import say
from pat_serve.training.data.remarks import Remarks
from pat_serve.training.data.row import Row, Tokenizer
from pat_serve.training.data.rows import parse_row

SHOWN_REASONS = 3
# The first bytes of a file that is no text, its kind, and the way to rows.
_NO_TEXT = {
    b"\x1f\x8b": ("a gzip archive", "Unpack it (gunzip)."),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", "Unpack it (unzstd)."),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "Unpack it, or save the spreadsheet as CSV."),
    b"ARROW1": ("an Arrow file", "Give the folder that datasets' save_to_disk wrote, or save it as Parquet."),
    b"PAR1": ("a Parquet file", "Rename it to end with .parquet."),
}
# datasets' save_to_disk leaves one of them, of a set and of several splits.
_SAVED = ("state.json", "dataset_dict.json")
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# A place to show ("rows.jsonl, line 3") and the row, or what is wrong with it.
RawRow = tuple[str, dict[str, Any] | DataError]


@dataclass(kw_only=True)
class SkippedRows:
    """Rows that `--skip-bad-rows` left out: how many, and the first reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Count a bad row and keep its reason."""
        self.count += 1
        if len(self.reasons) < SHOWN_REASONS:
            self.reasons.append(str(error))

    def report(self, source: str) -> None:
        """Tell the user, when there is something to tell."""
        if self.count:
            say(f"{source}: {self.count} bad rows left out, the first {len(self.reasons)} because of:")
            for reason in self.reasons:
                say(f"  {reason}")


def load_rows(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    flag: str = "--data",
    skip_bad: bool = False,
    remarks: Remarks | None = None,
) -> list[Row]:
    """Read a whole source.

    Args:
        source: path of a JSONL, JSON, CSV, TSV or Parquet file, a hub id, or a folder laid out like a hub dataset.
        split: of a hub dataset or a folder.
        tokenizer: for the chat template of `messages`.
        flag: the command's flag that named the source, for messages.
        skip_bad: leave bad rows out and say how many, instead of failing at the first.
        remarks: of a source that is read several times; by default its own.

    Raises:
        DataError: the source cannot be read, has no usable row, or a row of it is unusable (the message has its place).
    """
    skipped = SkippedRows() if skip_bad else None
    remarks = remarks or Remarks(source)
    rows = list(iterate_rows(source, split, tokenizer, flag=flag, skipped=skipped, remarks=remarks))
    if skipped is not None:
        skipped.report(source)
    if not rows:
        found = f"none ({skipped.count} bad ones left out)" if skipped is not None and skipped.count else "none"
        raise DataError(f"{flag} {source}", expected="at least one row", found=found, fix="Give a dataset with rows.")
    return rows


def iterate_rows(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    flag: str = "--data",
    skipped: SkippedRows | None = None,
    remarks: Remarks | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Read a source row by row; bad rows go into `skipped`, or are raised without it.

    Args:
        remarks: takes what is to be said once.
        streaming: fetch a hub dataset while it is read instead of downloading all of it first.
    """
    for where, raw in _raw_rows(source, split, flag, streaming):
        try:
            if isinstance(raw, DataError):
                raise raw
            row = parse_row(raw, where, tokenizer, remarks)
        except DataError as error:
            if skipped is None:
                raise
            skipped.add(error)
            continue
        yield row


def is_file(source: str) -> bool:
    """The source is a single file, not a dataset with splits."""
    return Path(source).is_file()


def _raw_rows(source: str, split: str, flag: str, streaming: bool) -> Iterator[RawRow]:
    path = Path(source)
    if path.is_file():
        _require_text(path)
        readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows}
        yield from readers.get(path.suffix.lower(), _jsonl_rows)(path)
        return
    if not path.is_dir() and (path.suffix in _FILE_SUFFIXES or source.startswith((".", "/", "~"))):
        raise DataError(
            f"{flag} {source}", expected="a data file or a hub id", found="no such file", fix="Check the path."
        )
    saved = any((path / name).is_file() for name in _SAVED)
    yield from (_saved_rows(path, split, flag) if saved else _hub_rows(source, split, flag, streaming))


def _require_text(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for mark, (found, fix) in _NO_TEXT.items():
        if start.startswith(mark) and not (mark == b"PAR1" and path.suffix.lower() == ".parquet"):
            raise DataError(path, expected="a file in the form of its name, or JSONL", found=found, fix=fix)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
            path, expected="a file in UTF-8", found="UTF-16, by its byte-order mark", fix="Save it as UTF-8."
        )


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    # Some editors begin a file with a byte-order mark, and files are joined with theirs.
                    text = line.decode("utf-8-sig")
                    yield where, _json_object(json.loads(text), where)
                except ValueError as error:  # of the JSON, or of the UTF-8
                    yield where, DataError(where, expected="a JSON object", found=str(error), fix="Mend the line.")


def _json_rows(path: Path) -> Iterator[RawRow]:
    """A list of objects, as Alpaca's own file is; a .json file may also hold one object a line."""
    with path.open("rb") as file:
        is_list = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    if not is_list:
        yield from _jsonl_rows(path)
        return
    try:
        items = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(path, expected="a JSON list of objects", found=str(error), fix="Mend the file.") from error
    for number, item in enumerate(items, start=1):
        where = f"{path}, item {number}"
        yield where, _json_object(item, where)


def _json_object(value: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(where, expected="a JSON object", found=type(value).__name__, fix="Mend the line.")


def _csv_rows(path: Path) -> Iterator[RawRow]:
    """Through the standard library: pyarrow guesses column types (a number is no text) and fails as a whole."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for number, fields in enumerate(reader, start=1):
                # A row may span lines; this is its last one.
                where = f"{path}, row {number} (line {reader.line_num})"
                yield where, _csv_fields(fields, where)
        except (csv.Error, UnicodeDecodeError) as error:  # the rest of the file cannot be told apart
            raise DataError(
                f"{path}, after row {number}", expected="CSV in UTF-8", found=first_line(error), fix="Mend the file."
            ) from error


def _csv_fields(fields: dict[str | Any, Any], where: str) -> dict[str, Any] | DataError:
    if None in fields:
        columns = len(fields) - 1
        found = f"{columns + len(fields[None])}"
        return DataError(where, expected=f"{columns} columns, as the header has", found=found, fix="Quote the commas.")
    return fields


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", fields
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}, after row {number}",
            expected="a Parquet file",
            found=first_line(error),
            fix="Copy the file again.",
        ) from error


def _saved_rows(path: Path, split: str, flag: str) -> Iterator[RawRow]:
    """Rows of a folder that datasets' save_to_disk wrote; a set without splits is read whole."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    # The library raises what it meets in the files.
    except Exception as error:
        raise DataError(
            f"{flag} {path}",
            expected="a dataset as save_to_disk writes it",
            found=first_line(error),
            fix="Save it again.",
        ) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            found = f"no split {split!r}; the splits are {', '.join(loaded)}"
            raise DataError(f"{flag} {path}", expected="a split of the dataset", found=found, fix="Name one of them.")
        loaded = loaded[split]
    for number, row in enumerate(loaded, start=1):
        yield f"{path}, row {number}", dict(row)


def _hub_rows(source: str, split: str, flag: str, streaming: bool) -> Iterator[RawRow]:
    from datasets import load_dataset

    number = 0
    try:
        for number, row in enumerate(load_dataset(source, split=split, streaming=streaming), start=1):
            yield f"{source}[{split}], row {number}", dict(row)
    # The library raises a dozen unrelated types (HTTP, cache, parsing); all mean the same to the user.
    except Exception as error:
        at = f" (after row {number})" if number else ""
        raise DataError(
            f"{flag} {source}{at}",
            expected="a data file, or a hub dataset that can be downloaded or is cached",
            found=f"no such file, and the library said {type(error).__name__}: {first_line(error)}",
            fix="Check the name, the split, the network and HF_TOKEN.",
        ) from error
