"""Rows for a look at a data file: an evenly spread sample, read by columns in batches."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from verl_prefix import training_data
from verl_prefix.config import DemonstrationConfig
from verl_prefix.demonstrations import offered
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError

_BATCH = 256
_SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Row:
    """What the preview needs of a training row.

    Attributes:
        number: position in the file, from 0.
        index: `extra_info.index`, which keys the draws (0 where the file has none, as in verl).
        prompt: messages, `[{role, content}, ...]`.
        demonstrations: of the cell of `prefix.demonstrations.column`, those not marked wrong.
        steps: for each of them the ends of its steps in characters; None where the file has none.
        ground_truth: `reward_model.ground_truth`; None if there is none.
    """

    number: int
    index: int | str
    prompt: list[dict[str, Any]]
    demonstrations: Any
    data_source: Any
    ground_truth: Any
    extra_info: dict[str, Any]
    steps: Any = None


def spread(total: int, count: int) -> list[int]:
    """`count` positions spread evenly over `total` (all of them if there are no more), ascending."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def read(file: str, columns: DemonstrationConfig, count: int | None) -> tuple[list[Row], int]:
    """An evenly spread sample of `count` rows (None: every row), and how many rows the file has.

    Args:
        columns: names the columns with the demonstrations and what belongs to them.

    Raises:
        PrefixConfigError: the file does not exist or has a suffix that verl does not read.
        DemonstrationError: not a readable file, or a row or column in it that training could not use; names file, row,
            column and mend.
    """
    if not os.path.isfile(file):
        folder = os.path.dirname(file) or "."
        there = os.listdir(folder) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(file), there)
        hint = f" Did you mean {os.path.join(os.path.dirname(file), near[0])}?" if near else ""
        raise PrefixConfigError("FILE", file, f"the file does not exist.{hint}")
    if not file.endswith(_SUFFIXES):
        raise PrefixConfigError("FILE", file, f"verl reads {', '.join(_SUFFIXES)}; convert the file.")
    with _readable(file):
        schema = training_data.schema(file)
        if "prompt" not in schema.names:
            raise DemonstrationError(
                f"{file}: has no column 'prompt', only {', '.join(schema.names)}. Add it (list of {{role, content}})."
            )
        training_data.check_columns(file, columns.column)
        wanted = ("prompt", "data_source", "reward_model", "extra_info")
        wanted += (columns.column, columns.correct_column, columns.steps_column)
        names = [name for name in wanted if name in schema.names]
        read_rows = _parquet if file.endswith(".parquet") else _json
        total, cells = read_rows(file, names, count)
        if not total:
            raise DemonstrationError(f"{file}: has no rows. Make the file again.")
        return [_row(file, number, cell, columns) for number, cell in cells], total


def _parquet(file: str, names: list[str], count: int | None) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    import pyarrow.parquet as pq

    source = pq.ParquetFile(file)
    total = source.metadata.num_rows
    picks = spread(total, total if count is None else count)

    def cells() -> Iterator[tuple[int, dict[str, Any]]]:
        rest = list(reversed(picks))
        begin = 0
        for group in range(source.num_row_groups):
            end = begin + source.metadata.row_group(group).num_rows
            if not rest:
                return
            if rest[-1] < end:  # groups without a pick are not read
                first = begin
                for batch in source.iter_batches(batch_size=_BATCH, row_groups=[group], columns=names):
                    while rest and rest[-1] < first + batch.num_rows:
                        number = rest.pop()
                        yield number, {n: _cell(file, number, n, batch.column(n)[number - first]) for n in names}
                    first += batch.num_rows
            begin = end

    return total, cells()


def _cell(file: str, number: int, name: str, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DemonstrationError(
            f"{file}: row {number}, column {name!r} is not UTF-8 ({error}). Write the text as UTF-8."
        ) from error


def _json(file: str, names: list[str], count: int | None) -> tuple[int, Iterator[tuple[int, dict[str, Any]]]]:
    rows = training_data.json_rows(file)
    picks = spread(len(rows), len(rows) if count is None else count)
    return len(rows), ((number, {name: rows[number][name] for name in names}) for number in picks)


def _row(file: str, number: int, cell: dict[str, Any], columns: DemonstrationConfig) -> Row:
    prompt, extra = cell["prompt"], cell.get("extra_info") or {}
    if not (isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)):
        raise DemonstrationError(
            f"{file}: row {number}, prompt is {str(prompt)[:60]!r}, not a list of {{role, content}}. Mend the row."
        )
    index = extra.get("index", 0)
    training_data.check_index(file, number, index)
    reward = cell.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    marks = cell.get(columns.correct_column)
    demonstrations, steps = (offered(cell.get(name), marks) for name in (columns.column, columns.steps_column))
    return Row(number, index, prompt, demonstrations, cell.get("data_source"), truth, extra, steps)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content") is not None


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """What the readers raise on a broken file, as one error that says so."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error
    except Exception as error:
        if type(error).__module__.startswith("datasets"):
            raise _unreadable(file, error.__cause__ or error) from error
        raise


def _unreadable(file: str, error: BaseException) -> DemonstrationError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DemonstrationError(
        f"{file}: cannot be read, it is damaged or of another format ({reason}). Make or copy the file again."
    )
