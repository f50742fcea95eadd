"""What the start-up check looks for in the data files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import UNUSABLE, DemonstrationTokenizer, as_list, offered
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError
from verl_prefix.names import AGENT_NAME
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

    The column's type is read off the file's schema; demonstrations are tokenised on a sample of 64 rows (on more only
    as long as no usable one was found), so that a large file costs seconds.

    Raises:
        DemonstrationError: names file, row and mend.
        PrefixConfigError: a file does not exist.
    """
    for key, files in (("data.train_files", train_files), ("data.val_files", val_files)):
        for file in files:
            if not os.path.exists(file):
                raise PrefixConfigError(key, file, "the file does not exist.")
    for file in val_files:
        _refuse_demonstrations(file, prefix.demonstrations.column)
    return _check_training(prefix, train_files, DemonstrationTokenizer(tokenizer, response_length))


def check_columns(file: str, column: str) -> None:
    """The demonstration column is there and holds strings, and no row is another agent's.

    Raises:
        DemonstrationError: names file, row and mend.
    """
    _refuse_other_agents(file)
    _check_column(file, column)


def check_index(file: str, row: int, index: Any) -> None:
    """`extra_info.index` keys the random choices of its row, so it has to be an integer or a string.

    Raises:
        DemonstrationError: names file, row and mend.
    """
    if not isinstance(index, (int, str)):
        raise DemonstrationError(
            f"{file}: row {row}, extra_info.index is {index!r}, not an integer or a string. Number the rows."
        )


def _check_training(prefix: PrefixConfig, files: Sequence[str], tokenizer: DemonstrationTokenizer) -> list[str]:
    column = prefix.demonstrations.column
    for file in files:
        check_columns(file, column)
    step_warnings = _check_steps(prefix, files, tokenizer)
    indices = _row_indices(files)
    sampled, usable, dropped, reasons = 0, 0, 0, Counter()
    marks = prefix.demonstrations.correct_column
    for cell, index in (pair for file in files for pair in _offered(file, column, marks)):
        if sampled >= _SAMPLE and usable:
            break
        if as_list(cell) and not keeps_demonstrations(prefix, index):
            dropped += 1
        elif as_list(cell):
            sampled += 1
            results = [tokenizer.classify(demonstration) for demonstration in as_list(cell)]
            unusable = [result for result in results if isinstance(result, str)]
            reasons.update(unusable)
            usable += len(results) - len(unusable)
    if not usable:
        why = _reasons(reasons)
        if not why and dropped:
            ratio = prefix.demonstrations.demo_ratio
            why = f"prefix.demonstrations.demo_ratio={ratio} drops all {dropped} rows; raise it"
        why = why or "every cell is empty"
        raise DemonstrationError(
            f"{', '.join(files)}: none of the demonstrations in {column!r} can be used ({why}). Raise "
            "data.max_response_length, mend the file, or set prefix.sampling.rollouts=0 for a run without prefixes."
        )
    return [*_usability_warnings(column, usable, reasons, sampled), *index_warnings(indices), *step_warnings]


def _is_list(found: Any, of: Callable[[Any], bool]) -> bool:
    """Whether an Arrow type is a list of what `of` accepts; a column without any value counts."""
    import pyarrow.types as types

    return types.is_null(found) or ((types.is_list(found) or types.is_large_list(found)) and of(found.value_type))


def _check_steps(prefix: PrefixConfig, files: Sequence[str], tokenizer: DemonstrationTokenizer) -> list[str]:
    """What `prefix.sampling.at_steps` needs; a warning for each file without steps."""
    import pyarrow.types as types

    if not prefix.sampling.at_steps:
        return []
    column, warn = prefix.demonstrations.steps_column, []
    for file in files:
        if column not in schema(file).names:
            warn.append(
                f"{file} has no column {column!r}: its demonstrations are cut by tokens, not at their steps. Add the "
                "column (list<list<int>>), or set prefix.sampling.at_steps=false."
            )
            continue
        tokenizer.require_offsets()
        found = schema(file).field(column).type
        if not _is_list(found, lambda inner: _is_list(inner, lambda t: types.is_integer(t) or types.is_null(t))):
            raise DemonstrationError(
                f"{file}: column {column!r} is {found}, not list<list<int>>: for each demonstration of the row the "
                "ends of its steps in characters. Mend the column, or set prefix.sampling.at_steps=false."
            )
    return warn


def _row_indices(files: Sequence[str]) -> Counter:
    """How often each `extra_info.index` occurs; every row has to have a usable one."""
    indices: Counter = Counter()
    for file in files:
        for row, (_, index) in enumerate(_cells(file, None)):
            check_index(file, row, index)
            indices[index] += 1
    return indices


def _refuse_other_agents(file: str) -> None:
    """A column `agent_name` overrides the configured agent loop row by row."""
    if "agent_name" not in schema(file).names:
        return
    for row, (_, agent) in enumerate(_cells(file, None, "agent_name")):
        if agent != AGENT_NAME:
            raise DemonstrationError(
                f"{file}: row {row}, agent_name is {agent!r}; every training row has to be on {AGENT_NAME}. "
                "Drop the column."
            )


def _reasons(reasons: Counter) -> str:
    return ", ".join(f"{count} {UNUSABLE[reason]}" for reason, count in reasons.most_common())


def _usability_warnings(column: str, usable: int, reasons: Counter, sampled: int) -> list[str]:
    unusable = sum(reasons.values())
    if unusable <= _WARN_UNUSABLE * (usable + unusable):
        return []
    return [
        f"{unusable} of {usable + unusable} demonstrations in {column!r} cannot be used (first {sampled} rows: "
        f"{_reasons(reasons)}); "
        "their rows get plain rollouts."
    ]


def index_warnings(indices: Counter) -> list[str]:
    """A warning if many rows share their `extra_info.index` (index -> rows)."""
    rows = sum(indices.values())
    if rows < 2 or len(indices) > rows / 2:
        return []
    return [
        f"extra_info.index takes only {len(indices)} values in {rows} rows; rows that share one draw the "
        "same prefix ratio in a step. Number the rows."
    ]


def _check_column(file: str, column: str) -> None:
    """The column exists and holds strings or lists of strings (Arrow gives a column one type)."""
    import pyarrow.types as types

    found_schema = schema(file)
    if column not in found_schema.names:
        raise DemonstrationError(
            f"{file}: has no column {column!r}, so no rollout can have a prefix. Add the column (list<string>) or name "
            "yours with prefix.demonstrations.column=NAME."
        )
    found = found_schema.field(column).type
    element = found.value_type if types.is_list(found) or types.is_large_list(found) else found
    if types.is_string(element) or types.is_large_string(element) or types.is_null(element):
        return
    for row, (cell, _) in enumerate(_cells(file, column)):
        for position, demonstration in enumerate(as_list(cell)):
            if isinstance(demonstration, str):
                continue
            raise DemonstrationError(
                f"{file}: row {row}, {column}[{position}] is {type(demonstration).__name__} "
                f"({str(demonstration)[:40]!r}), not a string. Write the demonstrations as list<string>."
            )


def _refuse_demonstrations(file: str, column: str) -> None:
    names = set(schema(file).names)
    if column not in names:
        return
    agent_column = "agent_name" if "agent_name" in names else None
    for row, (cell, agent) in enumerate(_cells(file, column, agent_column)):
        if as_list(cell) and (agent_column is None or agent == AGENT_NAME):
            raise DemonstrationError(
                f"{file}: validation row {row} carries a demonstration in {column!r}; its prefix would be given to the "
                "model in validation. Drop the column from the validation file."
            )


def schema(file: str) -> Any:
    """Arrow schema of a parquet or JSON-lines file, as verl's dataset reads it."""
    import pyarrow.parquet as pq

    return pq.read_schema(file) if file.endswith(".parquet") else json_rows(file).features.arrow_schema


def _cells(file: str, column: str | None, other: str | None = None) -> Iterator[tuple[Any, Any]]:
    """(cell of `column`, row index or cell of `other`) for each row, read in batches; only these columns are read."""
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        wanted = [name for name in (column, other or "extra_info.index") if name]
        batches = (batch.to_pylist() for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=wanted))
    else:
        batches = iter([json_rows(file)])
    for rows in batches:
        for row in rows:
            key = row.get(other) if other else (row.get("extra_info") or {}).get("index", 0)
            yield row.get(column), key


def _offered(file: str, column: str, marks: str) -> Iterator[tuple[list[Any], Any]]:
    """As `_cells`, without the demonstrations that the column `marks`, where the file has it, calls wrong."""
    if marks not in schema(file).names:
        yield from _cells(file, column)
        return
    for (cell, index), (_, marked) in zip(_cells(file, column), _cells(file, None, marks), strict=True):
        yield offered(cell, marked), index


def json_rows(file: str) -> Any:
    """The rows of a JSON-lines file as a `datasets.Dataset`, as verl reads them."""
    import datasets

    return datasets.load_dataset("json", data_files=file)["train"]
