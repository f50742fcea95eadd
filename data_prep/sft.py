"""The demonstrations of a training file as verl's SFT data (`messages`): SFT and RL then train on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep import writing
from data_prep.decontaminate import open_parquet
from data_prep.errors import DataError

_COLUMNS = ("data_source", "prompt", "extra_info", "demos", "demos_correct")


def schema() -> Any:
    """Arrow schema of an SFT file."""
    from datasets import Features, List, Value

    return Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "data_source": Value("string"),
            "extra_info": {"index": Value("int64"), "demo": Value("int64")},
        }
    ).arrow_schema


def export(
    train: Path, out: Path, *, first_only: bool = False, progress: Callable[[int], None] = lambda read: None
) -> int:
    """One conversation per demonstration that is not known to be wrong: the prompt, then the demonstration.

    `extra_info` says which row of `train` (`index`) and which of its demonstrations (`demo`) it is.

    Args:
        first_only: take only the first such demonstration of a row, so that every prompt weighs the same.

    Returns:
        conversations written.

    Raises:
        DataError: `train` has no demonstrations. An earlier `out` is untouched.
    """
    parquet = open_parquet(train)
    names = parquet.schema_arrow.names
    for column in ("prompt", "demos"):
        if column not in names:
            mend = "Give a training file that verl-prefix data convert wrote."
            raise DataError(train, f"is missing; the file has {names}", mend, column=column)
    read = written = 0
    with writing.replacing(out) as (part,), writing.parquet(part, schema()) as sink:
        for batch in parquet.iter_batches(batch_size=512, columns=[c for c in _COLUMNS if c in names]):
            found = []
            for row in batch.to_pylist():
                conversations = _conversations(row)
                found += conversations[:1] if first_only else conversations
            sink.rows(found)
            written += len(found)
            read += batch.num_rows
            progress(read)
        if not written:
            mend = "Convert a source that has some, or with other limits."
            raise DataError(train, f"has no demonstration in any of its {read} rows", mend, column="demos")
    return written


def _conversations(row: dict[str, Any]) -> list[dict[str, Any]]:
    demos, marks = row["demos"] or [], row.get("demos_correct") or []
    return [
        {
            "messages": [*row["prompt"], {"role": "assistant", "content": demo}],
            "data_source": row.get("data_source"),
            "extra_info": {"index": (row.get("extra_info") or {}).get("index"), "demo": position},
        }
        for position, demo in enumerate(demos)
        if not marks or marks[position] is not False
    ]
