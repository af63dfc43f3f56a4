"""A table written in shards, each whole or absent, so that a killed run resumes; joined into one file at the end.

The shards of recommendations.csv are in recommendations.csv.parts/, with a record of what they are made from.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from reclingua.utils.errors import InputError
from reclingua.utils.files import atomic_write, locked_folder, output_file, read_json, sync, write_json
from reclingua.utils.processes import Processes
from reclingua.utils.provenance import first_difference

ENDINGS = (".parquet", ".jsonl", ".csv")
RECORD = "shards.json"
MAX_ROWS = 4096  # requests of a shard
MIN_BATCHES = 4  # of a shard: requests of similar length share a batch, which takes some to choose from
SHARDS = 16  # at least that many, where that leaves MIN_BATCHES to each: for all processes to have work

Request = TypeVar("Request")


def shard_size(count: int, batch_size: int) -> int:
    """Return the requests of a shard, whole batches of them: the same for any number of processes."""
    batches = -(-min(-(-count // SHARDS), MAX_ROWS) // batch_size)
    return max(batches, MIN_BATCHES) * batch_size


class ShardedOutput(Generic[Request]):
    """An output file, its shards, and the processes that write them: shard s is of process s % processes.

    Args:
        path: of the output; its ending is its format.
        size: requests of a shard.
        count: all requests.
    """

    def __init__(self, path: Path, size: int, count: int, processes: Processes):
        self.path, self.size, self.count, self.processes = path, size, count, processes
        self.folder = path.with_name(f"{path.name}.parts")
        self.num_shards = -(-count // size)

    @contextmanager
    def opened(self, made_from: Mapping[str, object]) -> Iterator[int]:
        """Hold the folder of shards, whose number is yielded; InputError if they are not made from `made_from`."""
        with ExitStack() as stack:
            if self.processes.is_main:
                output_file(self.path)
                stack.enter_context(locked_folder(self.folder))
                self._check_record({**made_from, "rows of a shard": self.size})
                stack.callback(self._remove_if_empty)
                self.processes.announce("opened")
            self.processes.wait_for("opened", [0])
            yield sum(self._shard(number).exists() for number in range(self.num_shards))

    def _check_record(self, made_from: dict[str, object]) -> None:
        record = self.folder / RECORD
        if not record.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise InputError(f"{self.folder}: holds other files than shards; name another --output")
        if not self._has_shards():
            write_json(record, made_from, indent=1)
        stored = read_json(record, "what shards are made from")
        if stored != made_from:
            raise InputError(
                f"{self.folder}: holds shards made with another {first_difference(stored, made_from)}; delete it to "
                "start again, or name another --output"
            )

    def _remove_if_empty(self) -> None:
        """Delete the folder if it has no shard: a run was refused before its first one."""
        if self.folder.is_dir() and not self._has_shards():
            shutil.rmtree(self.folder)

    def _has_shards(self) -> bool:
        return any(self.folder.glob("[0-9]*.parquet"))

    def write(self, requests: Iterable[Request], compute: Callable[[list[Request]], pa.Table]) -> Iterator[int]:
        """Compute and write the missing shards of this process, and yield the number of requests of each."""
        rows = iter(requests)
        for number in range(self.num_shards):
            shard = list(islice(rows, self.size))
            is_own = number % self.processes.count == self.processes.rank
            if is_own and not self._shard(number).exists():
                table = compute(shard)
                with atomic_write(self._shard(number)) as temporary:
                    pq.write_table(table, temporary)
                yield len(shard)

    def join(self, summarize: Callable[[pa.Table], None]) -> int:
        """Join the shards of all processes into the output, and delete them; in the first process alone.

        Args:
            summarize: is given each shard.

        Returns:
            the number of rows.

        Raises:
            InputError: a shard or the output cannot be read or written.
        """
        self.processes.announce("written")
        if not self.processes.is_main:
            return 0
        self.processes.wait_for("written", range(self.processes.count))
        joined, num_rows = self.folder / "joined", 0
        try:
            with open_writer(joined, self.path.suffix.lower()) as write:
                for number in range(self.num_shards):
                    table = self._read_shard(number)
                    write(table)
                    summarize(table)
                    num_rows += len(table)
            sync(joined)
            os.replace(joined, self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error}); run the command again") from error
        shutil.rmtree(self.folder, ignore_errors=True)
        return num_rows

    def _read_shard(self, number: int) -> pa.Table:
        try:
            return pq.read_table(self._shard(number))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self._shard(number)}: cannot be read ({error}); delete it, and run again") from None

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"


@contextmanager
def open_writer(path: Path, ending: str) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that appends a table to the file at `path`, in the format of `ending`."""
    with ExitStack() as stack:
        if ending == ".parquet":
            writers: list[pq.ParquetWriter] = []

            def write(table: pa.Table) -> None:
                if not writers:
                    writers.append(stack.enter_context(pq.ParquetWriter(path, table.schema)))
                writers[0].write_table(table)

        else:
            file = stack.enter_context(path.open("w", encoding="utf-8", newline=""))

            def write(table: pa.Table) -> None:
                is_first = not file.tell()
                if ending == ".csv":
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerows([table.column_names] if is_first else [])
                    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
                else:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())

        yield write
