"""Raw files for DuckDB to stream, gzipped or not, and the line numbers of their errors.

DuckDB reports an error, but not reliably its line: a file with an error is read again, line by line.
"""

import csv
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import duckdb

from reclingua.utils.errors import InputError

DISK_ERRORS = (duckdb.IOException, duckdb.TransactionException)  # raised for a full disk, and for unreadable files


@dataclass(frozen=True)
class JsonLines:
    """File with one JSON object per line; `fields` are its columns, as text, or as JSON if `as_json`."""

    path: Path
    fields: tuple[str, ...]
    as_json: bool = False
    encoding: str = "utf-8"

    @property
    def sql(self) -> str:
        """SQL table function that returns the rows."""
        columns = ", ".join(f"{literal(field)}: '{'JSON' if self.as_json else 'VARCHAR'}'" for field in self.fields)
        return f"read_json({_source(self.path)}, format='newline_delimited', columns={{{columns}}})"

    def check(self, lines: Iterator[str]) -> Iterator[tuple[bool, int]]:
        """Yield (whether the line is a row, its number) of each line; ValueError at one that is no JSON object."""
        for number, text in enumerate(lines, start=1):
            if text.strip():
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise ValueError("no JSON object")
                json.dumps(record, ensure_ascii=False).encode()  # fails on lone surrogates
            yield bool(text.strip()), number


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

    @property
    def sql(self) -> str:
        """SQL table function that returns the rows."""
        columns = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(self.width))
        quote = '"' if self.quoted else ""
        return (
            f"read_csv({_source(self.path)}, auto_detect=false, columns={{{columns}}}, "
            f"delim={literal(self.delimiter)}, quote='{quote}', escape='{quote}', header={self.header}, "
            f"null_padding={self.padded}, encoding='{self.encoding}')"
        )

    def check(self, lines: Iterator[str]) -> Iterator[tuple[bool, int]]:
        """Yield (whether it is a row, its last line) of each row or empty line; ValueError at a wrong field count."""
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True) if self.quoted else None
        rows = reader or (line.rstrip("\r\n").split(self.delimiter) for line in lines)
        header = self.header
        for number, row in enumerate(rows, start=1):
            is_empty = row in ([], [""])
            if not is_empty and (len(row) > self.width or len(row) < self.width and not self.padded):
                raise ValueError(f"it has {len(row)} fields, not {self.width}")
            yield not is_empty and not header, reader.line_num if reader else number
            header = header and is_empty


def literal(text: str) -> str:
    """Return text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _source(path: Path) -> str:
    """Return the first arguments of DuckDB's readers: the path without glob patterns, and no detection by name."""
    compression = "gzip" if path.suffix == ".gz" else "none"
    return f"{literal(glob.escape(str(path)))}, compression='{compression}', hive_partitioning=false"


def require_file(path: Path) -> Path:
    """Return the path; InputError if it is no file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; see --raw_path")
    return path


def execute_on_file(con: duckdb.DuckDBPyConnection, statement: str, raw: JsonLines | Table) -> None:
    """Run a statement that reads the raw file; InputError names the first line that cannot be read."""
    try:
        con.execute(statement)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        for _ in _row_lines(raw):
            pass
        if isinstance(error, DISK_ERRORS) and raw.path.name not in str(error):
            raise
        reason = str(error).partition("\n")[0][:300]
        raise InputError(f"{raw.path}: cannot be read ({reason}); repair the file") from None


def line_of(raw: JsonLines | Table, row: int) -> str:
    """Return 'line 7', the last line of 0-based row `row`."""
    line = next(islice(_row_lines(raw), row, None), None)
    return f"row {row + 1:,}" if line is None else f"line {line}"


def _row_lines(raw: JsonLines | Table) -> Iterator[int]:
    """Yield the last line of each row; InputError at the first line that cannot be read."""
    line = 0
    try:
        with _open(raw.path) as file:
            for is_row, line in raw.check(text.decode(raw.encoding) for text in file):
                if is_row:
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{raw.path}: line {line + 1} cannot be read ({error}); get the file again") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise InputError(
            f"{raw.path}: line {line + 1} cannot be read ({error}); repair the file or remove the line"
        ) from None


def header_of(path: Path, delimiters: str, quoted: bool) -> dict[str, list[str]]:
    """Return the column names of the first line, split at each of the possible `delimiters`."""
    try:
        with _open(require_file(path)) as file:
            line = file.readline(2**20).decode("utf-8-sig").rstrip("\r\n")
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        return {
            delimiter: next(csv.reader([line], delimiter=delimiter, quoting=quoting), []) for delimiter in delimiters
        }
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise InputError(f"{path}: line 1 cannot be read ({error}); it should contain the column names") from None


def _open(path: Path) -> BinaryIO:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")
