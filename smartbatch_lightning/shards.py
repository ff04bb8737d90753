"""A table written in shards, by one process or several, and joined at the end, so that a kill loses one shard."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from filelock import BaseFileLock

from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.storage import atomic_write, lock_folder, reporting_write_errors


class TableShards:
    """Shards of a table, in the folder `NAME.shards` next to the final file.

    Every rank writes a part of each shard. Parts are written atomically, and a shard is finished once all ranks of one
    run have written theirs.

    Args:
        path: The final file, Parquet or CSV according to its suffix.
        remedy: What to do about a folder that cannot be used, for the end of messages.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path = path
        self.folder = path.with_name(f"{path.name}.shards")
        self.remedy = remedy
        self._fingerprint_path = self.folder / "fingerprint.json"
        self._lock: BaseFileLock | None = None

    def acquire(self, fingerprint: dict[str, Any], *, overwrite: bool) -> int:
        """Locks the folder for the ranks of this run, until `release`; called on rank 0.

        Args:
            fingerprint: What the rows depend on, by name.
            overwrite: Remove the shards of a run with another fingerprint.

        Returns:
            Number of finished shards, counted from the first, left by a run with this fingerprint.

        Raises:
            ValueError: A run with another fingerprint left shards, or another process is writing to the folder.
        """
        self._lock = lock_folder(self.folder / "run", self.remedy)
        fingerprint = json.loads(json.dumps(fingerprint, default=str))
        if finished := self.num_finished:
            before = json.loads(self._fingerprint_path.read_text()) if self._fingerprint_path.exists() else {}
            differing = [name for name in {**before, **fingerprint} if before.get(name) != fingerprint.get(name)]
            if not differing:
                return finished
            if not overwrite:
                raise UsageError(
                    f"{self.folder} has {finished:,} shards of an unfinished run, whose {join_quoted(differing)} "
                    f"differ from this run's. To resume that run, use the same. {self.remedy}"
                )
        with reporting_write_errors(self.folder, self.remedy):
            for part in self.folder.glob("*.parquet"):
                part.unlink()
            atomic_write(self._fingerprint_path, lambda tmp_path: tmp_path.write_text(json.dumps(fingerprint)))
        return 0

    def check_shared(self) -> None:
        """Rejects a folder that rank 0 has created on a disk that this rank does not share."""
        if not self._fingerprint_path.exists():
            raise UsageError(
                f"rank 0 writes to {self.folder}, which another rank cannot find. Give a path on a disk that all ranks "
                "share."
            )

    def release(self) -> None:
        """Releases the folder; removes it if it has no shards."""
        if self._lock is not None:
            finished = self.num_finished
            self._lock.release()
            self._lock = None
            if not finished:
                shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def num_finished(self) -> int:
        """Number of finished shards, counted from the first without a gap."""
        parts = self._parts()
        return next(shard for shard in count() if shard not in parts)

    def write(self, table: pa.Table, shard: int, rank: int, num_ranks: int) -> None:
        """Writes a rank's part of a shard."""
        path = self.folder / f"{shard:06}.{rank}-of-{num_ranks}.parquet"
        with reporting_write_errors(path, "Free some space; the same command then continues from here."):
            atomic_write(path, lambda tmp_path: pyarrow.parquet.write_table(table, tmp_path))

    def join(self, num_shards: int, order_by: str, complete: Callable[[pa.Table], pa.Table]) -> int:
        """Writes the final file atomically, shard by shard, and removes the folder.

        Args:
            num_shards: Number of shards.
            order_by: Column by which to sort the rows of each shard.
            complete: Turns the sorted rows of a shard into those of the file.

        Returns:
            Number of rows in the file.
        """
        parts, num_rows = self._parts(), 0

        def tables() -> Iterator[pa.Table]:
            nonlocal num_rows
            for shard in range(num_shards):
                table = complete(pa.concat_tables(map(_read, parts[shard])).sort_by(order_by))
                num_rows += len(table)
                yield table

        with reporting_write_errors(self.path, "Free some space; the same command then continues from here."):
            atomic_write(self.path, lambda tmp_path: _write_tables(tables(), tmp_path, self.path.suffix))
            for path in self.folder.glob("*.parquet"):
                path.unlink()
        return num_rows

    def _parts(self) -> dict[int, list[Path]]:
        """Files of each finished shard."""
        found: dict[tuple[int, int], list[Path]] = defaultdict(list)
        for path in self.folder.glob("*.parquet"):
            if named := re.fullmatch(r"(\d+)\.\d+-of-(\d+)\.parquet", path.name):
                found[int(named[1]), int(named[2])].append(path)
        return {shard: sorted(paths) for (shard, num_ranks), paths in found.items() if len(paths) == num_ranks}


def _read(path: Path) -> pa.Table:
    try:
        return pyarrow.parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is damaged: {error} Delete it; the same command then recreates it.") from error


def _write_tables(tables: Iterator[pa.Table], path: Path, suffix: str) -> None:
    """Writes tables with the same schema one after another, in Parquet as one row group each."""
    if suffix == ".csv":
        tables = (_without_formulas(_without_lists(table)) for table in tables)
    make = pyarrow.csv.CSVWriter if suffix == ".csv" else pyarrow.parquet.ParquetWriter
    first = next(tables)
    with make(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _without_lists(table: pa.Table) -> pa.Table:
    """The table with lists and other nested values as JSON, for CSV."""
    for number, column in enumerate(table.columns):
        if pa.types.is_nested(column.type):
            rows = column.to_pylist()
            rows = [None if row is None else json.dumps(row, ensure_ascii=False, default=str) for row in rows]
            table = table.set_column(number, table.column_names[number], pa.array(rows, pa.string()))
    return table


def _without_formulas(table: pa.Table) -> pa.Table:
    for number, column in enumerate(table.columns):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            escaped = pc.replace_substring_regex(column, r"\A('*[=+\-@\t\r])", r"'\1")
            table = table.set_column(number, table.column_names[number], escaped)
    return table
