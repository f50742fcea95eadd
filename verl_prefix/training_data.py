"""What the start-up check looks for in the data files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import UNUSABLE, DemonstrationTokenizer, as_list
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError
from verl_prefix.sampling import keeps_demonstrations

#: rows with demonstrations that are tokenised to estimate how many are usable
_SAMPLE = 64
#: share of unusable demonstrations in the sample from which on the run warns
_WARN_UNUSABLE = 0.05


def check(
    prefix: PrefixConfig,
    *,
    train_files: Sequence[str],
    val_files: Sequence[str],
    tokenizer: Any,
    response_length: int,
) -> list[str]:
    """Refuse files without usable demonstrations and validation files with any. Returns warnings.

    Every cell of the column is checked for its type; tokens are counted on a sample of 64 rows (on more only as long as
    no usable demonstration was found).

    Raises:
        DemonstrationError: names file, row and mend.
        PrefixConfigError: a file does not exist.
    """
    for key, files in (("data.train_files", train_files), ("data.val_files", val_files)):
        for file in files:
            if "://" not in file and not os.path.exists(file):
                raise PrefixConfigError(key, file, "the file does not exist.")
    for file in val_files:
        _refuse_demonstrations(file, prefix.demonstrations.column)
    return _check_training(prefix, train_files, DemonstrationTokenizer(tokenizer, response_length))


def _check_training(prefix: PrefixConfig, files: Sequence[str], tokenizer: DemonstrationTokenizer) -> list[str]:
    column = prefix.demonstrations.column
    indices: Counter = Counter()
    seen, sampled, reasons = 0, 0, Counter()
    usable = 0
    for file in files:
        if column not in _columns(file):
            raise DemonstrationError(
                f"{file}: has no column {column!r}, so no rollout can have a prefix. Add the column (list<string>) or "
                "name yours with prefix.demonstrations.column=NAME."
            )
        for row, (cell, index) in enumerate(_cells(file, column)):
            indices[index] += 1
            _check_types(file, row, column, cell)
            if not as_list(cell) or not keeps_demonstrations(prefix, index):
                continue
            seen += 1
            if sampled < _SAMPLE or usable == 0:
                sampled += 1
                results = [tokenizer.classify(demonstration) for demonstration in as_list(cell)]
                reasons.update(result for result in results if isinstance(result, str))
                usable += sum(not isinstance(result, str) for result in results)
    if not usable:
        why = (
            ", ".join(f"{count} {UNUSABLE[reason]}" for reason, count in reasons.most_common()) or "every cell is empty"
        )
        raise DemonstrationError(
            f"{', '.join(files)}: none of the demonstrations in {column!r} can be used ({why}). Raise "
            "data.max_response_length, mend the file, or set prefix.sampling.rollouts=0 for a run without prefixes."
        )
    return [*_usability_warnings(column, usable, reasons, sampled), *_index_warnings(indices)]


def _usability_warnings(column: str, usable: int, reasons: Counter, sampled: int) -> list[str]:
    unusable = sum(reasons.values())
    if unusable <= _WARN_UNUSABLE * (usable + unusable):
        return []
    why = ", ".join(f"{count} {UNUSABLE[reason]}" for reason, count in reasons.most_common())
    return [
        f"{unusable} of {usable + unusable} demonstrations in {column!r} cannot be used (first {sampled} rows: {why}); "
        "their rows get plain rollouts."
    ]


def _index_warnings(indices: Counter) -> list[str]:
    rows = sum(indices.values())
    if rows < 2 or len(indices) > rows / 2:
        return []
    return [
        f"extra_info.index takes only {len(indices)} values in {rows} rows; rows that share one draw the same prefix ratio "
        "in a step. Number the rows."
    ]


def _check_types(file: str, row: int, column: str, cell: Any) -> None:
    for position, demonstration in enumerate(as_list(cell)):
        if not isinstance(demonstration, str):
            raise DemonstrationError(
                f"{file}: row {row}, {column}[{position}] is {type(demonstration).__name__} "
                f"({str(demonstration)[:40]!r}), not a string. Write the demonstrations as list<string>."
            )


def _refuse_demonstrations(file: str, column: str) -> None:
    if column not in _columns(file):
        return
    agents = _columns(file) & {"agent_name"}
    for row, (cell, agent) in enumerate(_cells(file, column, *agents)):
        if as_list(cell) and (not agents or agent == "prefix_agent"):
            raise DemonstrationError(
                f"{file}: validation row {row} carries a demonstration in {column!r}; its prefix would be given to the "
                "model in validation. Drop the column from the validation file."
            )


def _columns(file: str) -> set[str]:
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        return set(pq.read_schema(file).names)
    return set(_json_rows(file).column_names)


def _cells(file: str, column: str, other: str | None = None) -> Iterator[tuple[Any, Any]]:
    """(cell of `column`, row index or cell of `other`) for each row, read in batches."""
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        names = [name for name in (column, other or "extra_info") if name in _columns(file)]
        batches = (batch.to_pylist() for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=names))
    else:
        batches = iter([_json_rows(file)])
    for rows in batches:
        for row in rows:
            key = row.get(other) if other else (row.get("extra_info") or {}).get("index", 0)
            yield row.get(column), key


def _json_rows(file: str):
    import datasets

    return datasets.load_dataset("json", data_files=file)["train"]
