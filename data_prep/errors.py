"""Errors of the data commands: each names file, row, column and mend."""

from __future__ import annotations

from verl_prefix.exceptions import PrefixError


class DataError(PrefixError, ValueError):
    """Input that cannot be converted, or output that cannot be written.

    Usual causes: a column that is not there, a cell of another type than its neighbours, text that is not UTF-8, a
    download that stopped half-way, a full disk. Nothing of an earlier output has been touched when this is raised.

    Args:
        file: file or hub id.
        problem: what is wrong, after "file: row r, column c ".
        mend: what to do about it, a sentence.
        row: 0-based row in that file, if one row is to blame.
        column: column, if one is to blame.
    """

    def __init__(self, file: object, problem: str, mend: str, row: int | None = None, column: str | None = None):
        self.file, self.problem, self.mend, self.row, self.column = str(file), problem, mend, row, column
        super().__init__(file, problem, mend, row, column)

    def __str__(self) -> str:
        where = [f"row {self.row}"] if self.row is not None else []
        where += [f"column {self.column!r}"] if self.column else []
        return f"{self.file}: {', '.join(where)}{' ' if where else ''}{self.problem}. {self.mend}"


class BadCell(Exception):
    """A cell that a rule cannot use; the converter adds file and row and makes a `DataError` of it."""

    def __init__(self, column: str, problem: str, mend: str):
        self.column, self.problem, self.mend = column, problem, mend
        super().__init__(column, problem, mend)
