"""Raw files as DuckDB streams them, gzipped or not, and where in one a fault is.

DuckDB tells that something is wrong, but not surely in which line: a file with a fault is read again, line by line.
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

NO_ROOM = (duckdb.IOException, duckdb.TransactionException)  # what comes of a full disk; of unreadable files, too


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; each of `fields` is a column that holds the field's text, or its JSON if `as_json`."""

    path: Path
    fields: tuple[str, ...]
    as_json: bool = False
    encoding: str = "utf-8"

    @property
    def sql(self) -> str:
        """A table function that gives the rows."""
        columns = ", ".join(f"{literal(field)}: '{'JSON' if self.as_json else 'VARCHAR'}'" for field in self.fields)
        return f"read_json({_source(self.path)}, format='newline_delimited', columns={{{columns}}})"

    def check(self, lines: Iterator[str]) -> Iterator[tuple[bool, int]]:
        """Whether each line is a row, and its number; ValueError at one that is no JSON object."""
        for number, text in enumerate(lines, start=1):
            if text.strip():
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise ValueError("no JSON object")
                json.dumps(record, ensure_ascii=False).encode()  # half an emoji is no text
            yield bool(text.strip()), number


@dataclass(frozen=True)
class Table:
    """Lines of `width` fields, columns c0, c1, ...; empty lines do not count."""

    path: Path
    width: int
    delimiter: str
    quoted: bool = False  # fields may stand in double quotes, with line ends within
    padded: bool = False  # fields may lack at the end of a line
    header: bool = True
    encoding: str = "utf-8"

    @property
    def sql(self) -> str:
        """A table function that gives the rows."""
        columns = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(self.width))
        quote = '"' if self.quoted else ""
        return (
            f"read_csv({_source(self.path)}, auto_detect=false, columns={{{columns}}}, "
            f"delim={literal(self.delimiter)}, quote='{quote}', escape='{quote}', header={self.header}, "
            f"null_padding={self.padded}, encoding='{self.encoding}')"
        )

    def check(self, lines: Iterator[str]) -> Iterator[tuple[bool, int]]:
        """Whether each row or empty line is a row, and the line it ends in; ValueError at a wrong number of fields."""
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True) if self.quoted else None
        rows = reader or (line.rstrip("\r\n").split(self.delimiter) for line in lines)
        header = self.header
        for number, row in enumerate(rows, start=1):
            empty = row in ([], [""])
            if not empty and (len(row) > self.width or len(row) < self.width and not self.padded):
                raise ValueError(f"it has {len(row)} fields, not {self.width}")
            yield not empty and not header, reader.line_num if reader else number
            header = header and empty


def literal(text: str) -> str:
    """Text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _source(path: Path) -> str:
    """The first arguments of DuckDB's readers: this file, even with a * in its name; nothing is guessed from it."""
    compression = "gzip" if path.suffix == ".gz" else "none"
    return f"{literal(glob.escape(str(path)))}, compression='{compression}', hive_partitioning=false"


def existing(path: Path) -> Path:
    """The path; InputError if there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; see --raw_path")
    return path


def load(con: duckdb.DuckDBPyConnection, statement: str, raw: JsonLines | Table) -> None:
    """Run a statement that reads the raw file; InputError names the line that cannot be read."""
    try:
        con.execute(statement)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        for _ in _row_lines(raw):
            pass
        if isinstance(error, NO_ROOM) and raw.path.name not in str(error):
            raise
        reason = str(error).partition("\n")[0][:300]
        raise InputError(f"{raw.path}: cannot be read ({reason}); repair the file") from None


def line_of(raw: JsonLines | Table, row: int) -> str:
    """'line 7', where row `row`, from 0, ends."""
    line = next(islice(_row_lines(raw), row, None), None)
    return f"row {row + 1:,}" if line is None else f"line {line}"


def _row_lines(raw: JsonLines | Table) -> Iterator[int]:
    """The line of each row; InputError at the first that cannot be read."""
    line = 0
    try:
        with _opened(raw.path) as file:
            for is_row, line in raw.check(text.decode(raw.encoding) for text in file):
                if is_row:
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{raw.path}: line {line + 1} cannot be read ({error}); get the file again") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise InputError(
            f"{raw.path}: line {line + 1} cannot be read ({error}); repair the file or take the line out"
        ) from None


def header_of(path: Path, delimiters: str, quoted: bool) -> dict[str, list[str]]:
    """The names in the first line, for each of the `delimiters` that might part them."""
    try:
        with _opened(existing(path)) as file:
            line = file.readline(2**20).decode("utf-8-sig").rstrip("\r\n")
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        return {one: next(csv.reader([line], delimiter=one, quoting=quoting), []) for one in delimiters}
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise InputError(f"{path}: line 1 cannot be read ({error}); it should hold the columns' names") from None


def _opened(path: Path) -> BinaryIO:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")
