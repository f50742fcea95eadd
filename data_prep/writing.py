"""Output files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.errors import DataError

#: a row group is written when so many bytes or rows have come together: few groups, bounded memory
_GROUP_BYTES = 32 << 20
_GROUP_ROWS = 50_000


@contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Paths beside `targets` to write to; each takes its target's place when the block ends without an error.

    On an error, Ctrl-C and SIGTERM (if turned into an exception) included, they are removed and the targets stay as
    they were. What a killed process left behind is removed by the next call.

    Raises:
        DataError: the disk is full, a target is a folder, or its folder cannot be written to.
    """
    parts = [target.with_name(f".{target.name}.{os.getpid()}.part") for target in targets]
    try:
        for target in targets:
            if target.is_dir():
                raise DataError(target, "is a folder", "Name a file in it.")
            _make_folder(target.parent)
            _remove_stale(target)
        yield parts
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.errno not in (errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        mend = "Free some space or name another --out" if full else "Name another --out"
        reason = os.strerror(error.errno)
        raise DataError(
            targets[-1], f"cannot be written ({reason})", f"{mend}; earlier output is untouched."
        ) from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(folder, "is no folder", "Name another --out.") from error


def _remove_stale(target: Path) -> None:
    for part in target.parent.glob(f".{glob_escape(target.name)}.*.part"):
        pid = re.search(r"\.(\d+)\.part$", part.name)
        if pid and not Path(f"/proc/{pid[1]}").exists() and not _alive(int(pid[1])):
            part.unlink(missing_ok=True)


def glob_escape(name: str) -> str:
    """`name` with the characters that a glob gives a meaning escaped."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class ParquetSink:
    """Writes rows or Arrow batches to one parquet file in row groups of bounded size.

    A row group is compressed and written in a thread of its own, without the interpreter's lock, while the next one is
    being made. At most two are in memory.
    """

    def __init__(self, file: Path, schema: Any):
        import pyarrow.parquet as pq

        self.schema = schema
        # a dictionary of texts that hardly ever repeat costs time and saves nothing
        repeated = [name for name in ("data_source", "ability") if name in schema.names]
        self._writer = pq.ParquetWriter(file, schema, compression="snappy", use_dictionary=repeated)
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._waiting: list[Any] = []
        self._waiting_bytes = self._waiting_rows = 0

    def rows(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        if rows:
            self.batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))

    def batch(self, batch: Any) -> None:
        self._waiting.append(batch)
        self._waiting_bytes += batch.nbytes
        self._waiting_rows += batch.num_rows
        if self._waiting_bytes >= _GROUP_BYTES or self._waiting_rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._wait()
        if self._waiting:
            table = pa.Table.from_batches(self._waiting, schema=self.schema)
            self._written = self._thread.submit(self._writer.write_table, table)
            self._waiting, self._waiting_bytes, self._waiting_rows = [], 0, 0

    def _wait(self) -> None:
        """Wait for the row group that is being written; raises what went wrong with it."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def close(self, *, complete: bool) -> None:
        """Finish the file; without `complete` the file is given up, and what waits is not written."""
        try:
            if complete:
                self._flush()
                self._wait()
                self._writer.close()
        finally:
            self._thread.shutdown()
            if not complete:
                with suppress(Exception):  # the disk may be full: the first error is the one to be seen
                    self._writer.close()


@contextmanager
def parquet(file: Path, schema: Any) -> Iterator[ParquetSink]:
    """A `ParquetSink` for the block."""
    sink, complete = ParquetSink(file, schema), False
    try:
        yield sink
        complete = True
    finally:
        sink.close(complete=complete)
