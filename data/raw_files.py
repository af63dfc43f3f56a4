"""Raw files for DuckDB to stream, gzipped or not; files with lines that it cannot read are normalized first.

DuckDB stops at the first line that it cannot read, and reads UTF-8 alone. Such a file is read line by line in Python,
and its readable records are written to a temporary file, which DuckDB then reads.
"""

import ast
import codecs
import csv
import glob
import gzip
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, NamedTuple

import duckdb

from reclingua.utils.errors import InputError
from reclingua.utils.text import shorten

DISK_ERRORS = (duckdb.IOException, duckdb.TransactionException)  # raised for a full disk, and for unreadable files
MAX_RECORD_LINES = 200  # a quote that is not closed within so many lines is a stray one


class Record(NamedTuple):
    """A record of a raw file: its last line, its text, and its fields, or None and what is wrong with it."""

    line: int
    text: str
    fields: dict | list[str] | None
    fault: str = ""


@dataclass(frozen=True)
class JsonLines:
    """File with one JSON object per line; `fields` are its columns, as text, or as JSON if `as_json`.

    A line can also be a Python dictionary, as in Amazon's metadata of 2014.
    """

    path: Path
    fields: tuple[str, ...]
    as_json: bool = False
    encoding: str = "utf-8"
    max_bytes: int = 2**24  # DuckDB's own limit for a line

    @property
    def sql(self) -> str:
        """SQL table function that returns the rows."""
        columns = ", ".join(f"{literal(field)}: '{'JSON' if self.as_json else 'VARCHAR'}'" for field in self.fields)
        return f"read_json({_source(self.path)}, format='newline_delimited', columns={{{columns}}})"

    def records(self, lines: Iterator[str]) -> Iterator[Record]:
        """Yield the records; empty lines are skipped."""
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            record, fault = parse_object(text), ""
            if record is None:
                fault = "is no JSON object"
            elif r"\u" in text and not _is_encodable(json.dumps(record, ensure_ascii=False, default=str)):
                record, fault = None, "has half a character"
            yield Record(number, text, record, fault)

    def normalized(self, path: Path) -> "JsonLines":
        """Return the description of the file that `normalize` writes."""
        return replace(self, path=path, encoding="utf-8")

    def write_record(self, fields: dict) -> str:
        """Return a record as a line of JSON."""
        return json.dumps({key: fields.get(key) for key in self.fields}, ensure_ascii=False, default=str) + "\n"


@dataclass(frozen=True)
class Table:
    """File of delimited fields, `width` per row, with columns c0, c1, ...; empty lines are skipped."""

    path: Path
    width: int
    delimiter: str
    quoted: bool = False  # fields can be in double quotes and contain line ends
    padded: bool = False  # the last fields of a line can be missing
    header: bool = True
    encoding: str = "utf-8"
    max_bytes: int = 2_000_000  # DuckDB's own limit for a row

    @property
    def sql(self) -> str:
        """SQL table function that returns the rows."""
        columns = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(self.width))
        quote = '"' if self.quoted else ""
        return (
            f"read_csv({_source(self.path)}, auto_detect=false, columns={{{columns}}}, "
            f"delim={literal(self.delimiter)}, quote='{quote}', escape='{quote}', header={self.header}, "
            f"null_padding={self.padded})"
        )

    def records(self, lines: Iterator[str]) -> Iterator[Record]:
        """Yield the records after the header; empty lines are skipped."""
        rows = self._quoted_rows(lines) if self.quoted else self._plain_rows(lines)
        is_header = self.header
        for line, text, row, fault in rows:
            if row in ([], [""]):
                continue
            if is_header:
                is_header = False
            elif row is None:
                yield Record(line, text, None, fault)
            elif len(row) > self.width or len(row) < self.width and not self.padded:
                yield Record(line, text, None, f"has {len(row)} fields, not {self.width}")
            else:
                yield Record(line, text, row + [""] * (self.width - len(row)))

    def _plain_rows(self, lines: Iterator[str]) -> Iterator[Record]:
        for number, line in enumerate(lines, start=1):
            text = line.rstrip("\r\n")
            yield Record(number, text, text.split(self.delimiter))

    def _quoted_rows(self, lines: Iterator[str]) -> Iterator[Record]:
        """Yield rows; a line with a quote that is not closed, or not where a field ends, is a row without fields.

        A field can contain line ends, so a line that is no row by itself is tried together with the next ones. If
        they make no row either, it alone is at fault, and reading continues at the line after it.
        """
        csv.field_size_limit(sys.maxsize)
        number, ahead = 0, deque[str]()
        while ahead or (line := next(lines, None)) is not None:
            text, taken = ahead.popleft() if ahead else line, 0
            number += 1
            if (row := self._split(text)) is None:
                row, text, taken = self._join(text, _look_ahead(lines, ahead))
            for _ in range(taken):
                ahead.popleft()
            number += taken
            yield Record(number, text, row, "" if row is not None else "has a quote that is not closed")

    def _join(self, text: str, following: Iterator[str]) -> tuple[list[str] | None, str, int]:
        """Return (row of a line and the next ones, its text, number of these); (None, text, 0) if there is none."""
        joined = text
        for count, line in enumerate(following, start=1):
            joined += line
            if '"' in line and (row := self._split(joined)) is not None:
                return (row, joined, count) if len(row) == self.width else (None, text, 0)
        return None, text, 0

    def _split(self, text: str) -> list[str] | None:
        """Return the fields of a row, None if its quotes do not match."""
        try:
            return next(csv.reader([text], delimiter=self.delimiter, strict=True), [])
        except csv.Error:
            return None

    def normalized(self, path: Path) -> "Table":
        """Return the description of the file that `normalize` writes."""
        return Table(path, self.width, ",", quoted=True, header=False)

    def write_record(self, fields: list[str]) -> str:
        """Return a record as a line, every field in quotes."""
        return ",".join('"' + field.replace('"', '""') + '"' for field in fields) + "\n"


RawFile = JsonLines | Table


def _look_ahead(lines: Iterator[str], ahead: deque[str]) -> Iterator[str]:
    """Yield up to MAX_RECORD_LINES lines that come next, and keep them in `ahead`."""
    for position in range(MAX_RECORD_LINES):
        if position == len(ahead):
            if (line := next(lines, None)) is None:
                return
            ahead.append(line)
        yield ahead[position]


def parse_object(text: str) -> dict | None:
    """Return the dictionary that a line of JSON or a Python literal describes, None if it is none."""
    try:
        record = json.loads(text, parse_constant=lambda _: None)  # NaN is a missing value
    except (ValueError, RecursionError):
        if not text.lstrip().startswith("{"):
            return None
        try:
            record = ast.literal_eval(text.strip())  # builds values only, and runs no code
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    return record if isinstance(record, dict) else None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def literal(text: str) -> str:
    """Return text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _source(path: Path) -> str:
    """Return the first arguments of DuckDB's readers: the path without glob patterns, and no detection by name."""
    compression = "gzip" if is_gzipped(path) else "none"
    return f"{literal(glob.escape(str(path)))}, compression='{compression}', hive_partitioning=false"


def require_file(path: Path) -> Path:
    """Return the path; InputError if it is no file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; see --raw_path")
    return path


def first_file(folder: Path, names: list[str]) -> Path:
    """Return the first of these files that the folder has; InputError if it has none."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: has none of {', '.join(names)}; see --raw_path")
    return path


def read_records(raw: RawFile) -> Iterator[Record]:
    """Yield the records of a raw file, also those that cannot be read; InputError if the file is cut short."""
    line = 0

    def lines(file: BinaryIO) -> Iterator[str]:
        nonlocal line
        # Bytes that are no text become surrogates, which `records` cannot write and `_checked` reports.
        encoding = "utf-8-sig" if raw.encoding == "utf-8" else raw.encoding
        for text in TextIOWrapper(file, encoding, errors="surrogateescape", newline="\n"):
            line += 1
            yield text

    try:
        with open_raw(raw.path) as file:
            for record in raw.records(lines(file)):
                yield _checked(record, raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{raw.path}: line {line + 1} cannot be read ({error}); get the file again") from None
    except (UnicodeError, LookupError) as error:
        raise InputError(f"{raw.path}: is not in the encoding {raw.encoding} ({error}); see --encoding") from None


def _checked(record: Record, raw: RawFile) -> Record:
    if not record.text.isascii() and not _is_encodable(record.text):
        return record._replace(fields=None, fault=f"is not in {raw.encoding}; see --encoding, such as latin-1")
    if len(record.text) > raw.max_bytes // 4 and len(record.text.encode()) > raw.max_bytes:
        return record._replace(fields=None, fault=f"is longer than {raw.max_bytes / 1e6:.0f} MB")
    return record


def normalize(raw: RawFile, path: Path, report_fault: Callable[[Record], None]) -> tuple[RawFile, int]:
    """Write readable records to `path`, report the others; return the description of the file and its rows."""
    num_readable = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in read_records(raw):
            if record.fields is None:
                report_fault(record)
            else:
                file.write(raw.write_record(record.fields))  # type: ignore[arg-type]
                num_readable += 1
    return raw.normalized(path), num_readable


def find_records(raw: RawFile, rows: set[int]) -> dict[int, Record]:
    """Return the records at 0-based positions among the readable ones."""
    records, last = {}, max(rows, default=-1)
    readable = (record for record in read_records(raw) if record.fields is not None)
    for row, record in enumerate(readable):
        if row in rows:
            records[row] = record
        if row >= last:
            break
    return records


def excerpt(text: str) -> str:
    """Return the beginning of a line, for messages."""
    return shorten(" ".join(text.encode("utf-8", "replace").decode().split()), 60)


def header_of(path: Path, delimiters: str, quoted: bool, encoding: str = "utf-8") -> dict[str, list[str]]:
    """Return the column names of the first line without white space, split at each of the possible `delimiters`."""
    try:
        with open_raw(require_file(path)) as file:
            codec = "utf-8-sig" if encoding == "utf-8" else encoding
            # Reads ahead of the first line; bytes there that are no text concern `read_records` alone.
            text = TextIOWrapper(file, codec, errors="surrogateescape", newline="\n")
            line = text.readline(2**20).rstrip("\r\n")
        line.encode()
        if not line.strip():
            raise ValueError("it is empty")
        if "\r" in line:
            raise ValueError("lines end with \\r alone; end them with \\n")
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        return {
            delimiter: [name.strip() for name in next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])]
            for delimiter in delimiters
        }
    except (UnicodeError, LookupError):
        with open_raw(path) as file:
            likely = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
        raise InputError(
            f"{path}: line 1 is not in {encoding}; name the encoding with --encoding, such as {likely}"
        ) from None
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise InputError(f"{path}: line 1 cannot be read ({error}); it should contain the column names") from None


OTHER_FORMATS = {  # first bytes -> what such a file is
    b"PK\x03\x04": "is a zip archive or an Excel table: unpack it, or save it as csv",
    b"PAR1": "is a parquet file: write it as csv, for instance with pandas",
    b"\xfd7zXZ": "is an xz archive: unpack it",
    b"BZh": "is a bzip2 archive: unpack it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
}


def is_gzipped(path: Path) -> bool:
    """Return whether a file is gzipped, by its first bytes: names with and without .gz are both wrong at times."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_raw(path: Path) -> BinaryIO:
    """Open a raw file, gzipped or not, for bytes; InputError if it is no text."""
    file = (gzip.open if is_gzipped(path) else open)(path, "rb")
    start = file.read(8)
    file.seek(0)
    if what := next((what for magic, what in OTHER_FORMATS.items() if start.startswith(magic)), None):
        file.close()
        raise InputError(f"{path}: {what}")
    return file  # type: ignore[return-value]
