"""Reads sources in batches of rows: parquet, JSON lines, JSON and CSV files, and data sets on the hub.

Files are read with Arrow and Python's own parsers rather than through a `datasets` cache: nothing is copied to disk
first, and every error can name file and row. A data set on the hub is streamed by `datasets.load_dataset`.
"""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from data_prep.errors import DataError

Rows = list[dict[str, Any]]

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 4096
_UTF8 = "Convert the file to UTF-8 (iconv -f latin1 -t utf-8)."
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Shard:
    """One file of a source, or the whole of a data set on the hub.

    Attributes:
        name: for messages.
        columns: names of its columns; None for an empty file, which has none.
        rows: number of rows where the format tells, else None.
        batches: batches(columns) -> (number of the first row, rows); columns that the shard lacks are left out.
    """

    name: str
    columns: list[str] | None
    rows: int | None
    batches: Callable[[Sequence[str]], Iterator[tuple[int, Rows]]]


def expand(paths: Iterable[str]) -> list[Path]:
    """Files for paths and globs, in the order given, the matches of a glob sorted.

    Raises:
        DataError: nothing there, a folder, or a suffix that is not read.
    """
    files: list[Path] = []
    for path in paths:
        matches = sorted(glob.glob(path)) if glob.has_magic(path) and not Path(path).exists() else [path]
        if not matches:
            raise DataError(path, "matches no file", "Check the pattern.")
        files += map(Path, matches)
    for file in files:
        if file.is_dir():
            raise DataError(file, "is a folder", f"Name its files, for example {file}/*.parquet.")
        if not file.exists():
            raise DataError(file, "does not exist", "Check the path.")
        if file.suffix not in SUFFIXES:
            raise DataError(file, f"is not one of {', '.join(SUFFIXES)}", "Convert it, or rename it to what it holds.")
    return files


def open_file(file: Path) -> Shard:
    """A local file as a shard."""
    return {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json, ".csv": _csv}[file.suffix](file)


def missing(shard: Shard, columns: Iterable[str]) -> list[str]:
    """Those of `columns` (paths, alternatives) that the shard has no top-level column for."""
    there = set(shard.columns or ())
    return [column for column in columns if not there.intersection(_top(column))]


def _top(column: str) -> list[str]:
    return [path.split(".")[0] for path in column.split("|")]


def _present(shard_columns: Sequence[str], wanted: Sequence[str]) -> list[str]:
    names = {name for column in wanted for name in _top(column)}
    return [name for name in shard_columns if name in names]


# --- parquet


def _parquet(file: Path) -> Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = "Fetch or write it again; the file is damaged or was cut off."
    try:
        # no read-ahead of whole row groups: batches are small, and memory stays bounded
        parquet = pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(file, f"is not a readable parquet file ({_first_line(error)})", broken) from error
    names, rows, metadata = parquet.schema_arrow.names, parquet.metadata.num_rows, parquet.metadata

    def batches(columns: Sequence[str]) -> Iterator[tuple[int, Rows]]:
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        count = max(16, min(_BATCH_ROWS, _BATCH_BYTES * max(rows, 1) // max(size, 1)))
        first = 0
        reader = parquet.iter_batches(batch_size=count, columns=_present(names, columns), use_threads=False)
        # the next batch is decoded, without the interpreter's lock, while the last one is worked on
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(next, reader, None)
            while True:
                try:
                    batch = following.result()
                except (pa.ArrowException, OSError) as error:
                    raise DataError(file, f"cannot be read on ({_first_line(error)})", broken, row=first) from error
                if batch is None:
                    return
                following = ahead.submit(next, reader, None)
                yield first, _python_rows(batch, file, first)
                first += batch.num_rows

    return Shard(str(file), names, rows, batches)


def _python_rows(batch: Any, file: object, first: int) -> Rows:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for offset in range(batch.num_rows):
            for name in batch.schema.names:
                try:
                    batch.column(name)[offset].as_py()
                except UnicodeDecodeError as error:
                    problem = f"is not UTF-8 (byte {error.start})"
                    raise DataError(
                        file, problem, "Write the file again with UTF-8 text.", first + offset, name
                    ) from None
        raise


# --- text formats


def _lines(file: Path) -> Iterator[str]:
    """The lines without a byte order mark. A byte that is not UTF-8 is kept as half a surrogate pair, to be refused
    where its row and column are known.
    """
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
        yield from stream


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_broken_text(value: Any, file: Path, row: int) -> None:
    r"""What cannot be written as UTF-8: a byte that was not, or half a character, which JSON can spell (`\ud83d`)."""
    for column, cell in value.items() if isinstance(value, dict) else ():
        try:
            column.encode()
            (cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            if "\udc80" <= error.object[error.start] <= "\udcff":  # what `surrogateescape` makes of a byte
                problem, mend = "is not UTF-8", _UTF8
            else:
                problem = "holds half a surrogate pair, which is not text"
                mend = "Mend or drop the row; its writer cut a character."
            raise DataError(file, problem, mend, row, column.encode(errors="replace").decode()) from None


def _json_lines(file: Path) -> Shard:
    def rows() -> Iterator[dict[str, Any]]:
        row = 0
        for line in _lines(file):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                _refuse_broken_text({"": line}, file, row)
                problem = f"is not JSON ({error})"
                raise DataError(file, problem, "Mend the line; the last one may have been cut off.", row) from None
            if "\\ud" in line.lower() or not _is_text(line):
                _refuse_broken_text(value, file, row)
            yield _json_row(value, file, row)
            row += 1

    return _from_rows(str(file), rows)


def _json(file: Path) -> Shard:
    """A list of objects, or JSON lines under this suffix. A list is read as a whole: JSON lines stream."""
    with open(file, "rb") as stream:
        start = next((block.lstrip(b"\xef\xbb\xbf \t\r\n") for block in iter(lambda: stream.read(4096), b"")), b"")
    if not start.startswith(b"["):
        return _json_lines(file)

    def rows() -> Iterator[dict[str, Any]]:
        try:
            values = json.loads("".join(_lines(file)))
        except (ValueError, RecursionError) as error:
            raise DataError(file, f"is not JSON ({error})", "Mend it; the file may have been cut off.") from None
        for row, value in enumerate(values):
            _refuse_broken_text(value, file, row)
            yield _json_row(value, file, row)

    return _from_rows(str(file), rows)


def _json_row(value: Any, file: Path, row: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(file, f"is {type(value).__name__}, not an object", "Write one JSON object per row.", row)
    return value


def _csv(file: Path) -> Shard:
    def rows() -> Iterator[dict[str, Any]]:
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader(_lines(file), strict=True)
        for row in count():
            try:
                value = next(reader, None)
            except csv.Error as error:
                mend = "Quote fields that hold commas or newlines; the file may have been cut off."
                raise DataError(file, f"is not CSV ({error})", mend, row) from None
            if value is None:
                return
            if None in value or None in value.values():
                fields = len(value) - (None in value)
                mend = "Quote fields that hold commas or newlines."
                raise DataError(file, f"has not the {fields} fields of the header", mend, row)
            _refuse_broken_text(value, file, row)
            yield value

    return _from_rows(str(file), rows)


def _from_rows(name: str, rows: Callable[[], Iterator[dict[str, Any]]]) -> Shard:
    first_row = next(rows(), None)

    def batches(columns: Sequence[str]) -> Iterator[tuple[int, Rows]]:
        names = {name for column in columns for name in _top(column)}
        stream, first = rows(), 0
        while batch := list(islice(stream, 256)):
            yield first, [{key: row[key] for key in row if key in names} for row in batch]
            first += len(batch)

    return Shard(name, None if first_row is None else list(first_row), None, batches)


# --- hub


def open_hub(hub: str, config: str | None, split: str, *, gated: bool = False) -> Shard:
    """A data set on the hub, streamed.

    Raises:
        DataError: it cannot be reached, with what to do without a network.
    """
    import datasets

    login = " The hub asks for consent to its terms: hf auth login first." if gated else ""
    mend = f"Fetch it where there is a network (hf download --repo-type dataset {hub}), then add --from FILES.{login}"
    try:
        stream = datasets.load_dataset(hub, config, split=split, streaming=True)
        names = stream.column_names
        if names is None:
            head = next(iter(stream.take(1)), None)
            names = None if head is None else list(head)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(hub, f"cannot be loaded ({type(error).__name__}: {_first_line(error)})", mend) from error

    def batches(columns: Sequence[str]) -> Iterator[tuple[int, Rows]]:
        first = 0
        tables = stream.select_columns(_present(names or (), columns)).with_format("arrow").iter(batch_size=256)
        try:
            for table in tables:
                yield first, _python_rows(table, hub, first)
                first += table.num_rows
        except DataError:
            raise
        except OSError as error:
            raise DataError(hub, f"broke off ({_first_line(error)})", f"Start again, or: {mend}", row=first) from error

    info = getattr(stream, "info", None)
    rows = info.splits[split].num_examples if info is not None and info.splits and split in info.splits else None
    return Shard(f"{hub} [{split}]", names, rows, batches)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:160]


def total_rows(shards: Iterable[Shard]) -> int | None:
    """Rows of all shards where each tells, else None."""
    counts = [shard.rows for shard in shards]
    return None if None in counts else sum(counts)


def read(shards: Sequence[Shard], columns: Sequence[str]) -> Iterator[tuple[Shard, int, Rows]]:
    """(shard, number of the first row, rows) for all batches of all shards."""
    return chain.from_iterable(((shard, first, rows) for first, rows in shard.batches(columns)) for shard in shards)
