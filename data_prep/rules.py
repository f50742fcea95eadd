"""Rules that a source's entry is made of: where in a raw row the question, the answer and the demonstrations are.

A rule is a frozen dataclass, called with a row (a dict of Python objects). A column is named by a path
(`choices.text`), or by alternatives (`question|problem`), of which the first that the row has counts. Every rule lists
the columns it cannot do without in `columns` and raises `BadCell` for a cell it cannot use.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from data_prep import answers
from data_prep.errors import BadCell

_AS_STRINGS = "Write the column as strings"


class Demonstration(NamedTuple):
    """One worked solution of a row.

    Attributes:
        text: as the policy would write it.
        correct: whether its answer is right, None where the source does not say.
        steps: end of each step as an offset into `text`, in characters; () where the source has no steps.
        rejected: why the source's own entry does not take it; None if it does.
        tokens: its length in tokens, once counted.
    """

    text: str
    correct: bool | None = None
    steps: tuple[int, ...] = ()
    rejected: str | None = None
    tokens: int | None = None


# --- cells


@cache
def _paths(column: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name.split(".")) for name in column.split("|"))


def cell(row: dict[str, Any], column: str) -> Any:
    """The cell at `column`; None where it is null.

    Raises:
        BadCell: the row has no such column.
    """
    for path in _paths(column):
        if path[0] not in row:
            continue
        value: Any = row
        for name in path:
            if value is None:
                return None
            if not isinstance(value, dict) or name not in value:
                found = f"has the fields {sorted(value)}" if isinstance(value, dict) else f"is {_shown(value)}"
                raise BadCell(column, f"is missing: {path[0]!r} {found}", f"Add the field {name!r}.")
            value = value[name]
        return value
    raise BadCell(column, f"is missing; the row has {sorted(row)}", "Add it to the row.")


def text(row: dict[str, Any], column: str) -> str:
    """A string that is not blank."""
    value = cell(row, column)
    if isinstance(value, str):
        if value.strip():
            return value
        raise BadCell(column, "is empty", "Fill it in, or drop such rows with --skip-bad.")
    if value is None:
        raise BadCell(column, "is null", "Fill it in, or drop such rows with --skip-bad.")
    raise BadCell(column, f"is {_shown(value)}, not a string", f"{_AS_STRINGS}.")


def texts(row: dict[str, Any], column: str) -> list[str]:
    """A list of strings."""
    value = cell(row, column)
    if isinstance(value, list):
        for position, item in enumerate(value):
            if not isinstance(item, str):
                raise BadCell(f"{column}[{position}]", f"is {_shown(item)}, not a string", f"{_AS_STRINGS}.")
        return value
    raise BadCell(column, f"is {_shown(value)}, not a list of strings", "Write the column as lists of strings.")


def _shown(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"


# --- prompts


@dataclass(frozen=True)
class Question:
    """A question in a column of its own."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> str:
        return text(row, self.column).strip()


@dataclass(frozen=True)
class Chat:
    """A list of {role, content}, as verl's files have it; a plain string is a question."""

    column: str = "prompt"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> str | list[dict[str, str]]:
        value = cell(row, self.column)
        if value is None or isinstance(value, str):
            return text(row, self.column).strip()
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else _shown(value)
            raise BadCell(self.column, f"is {found}, not a list of messages", "Write it as [{role, content}, ...].")
        turns = [_turn(message, f"{self.column}[{position}]") for position, message in enumerate(value)]
        if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise BadCell(
                self.column, "does not end in a user turn with text", "Cut it before the answer, or use --skip-bad."
            )
        return turns


def _turn(message: Any, column: str) -> dict[str, str]:
    """A message as {role, content}; {from, value} with human and gpt is understood too."""
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content}
    raise BadCell(column, f"is {_shown(message)}, not a message", "Write it as {role: string, content: string}.")


# --- multiple choice: (options, position of the right one)


@dataclass(frozen=True)
class Options:
    """Options in a list column, the right one given by its letter, its label or its position."""

    options: str
    answer: str
    labels: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.options, self.answer)

    def __call__(self, row: dict[str, Any], seed: int) -> tuple[list[str], int]:
        options = texts(row, self.options)
        labels = texts(row, self.labels) if self.labels else [chr(ord("A") + i) for i in range(len(options))]
        right = text(row, self.answer).strip()
        if right not in labels or len(labels) != len(options):
            raise BadCell(self.answer, f"is {right!r}, but the options are {labels}", "Mend it, or use --skip-bad.")
        return options, labels.index(right)


@dataclass(frozen=True)
class ShuffledOptions:
    """The right option and the wrong ones in columns of their own; put in an order drawn from (seed, question)."""

    question: str
    right: str
    wrong: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.question, self.right, *self.wrong)

    def __call__(self, row: dict[str, Any], seed: int) -> tuple[list[str], int]:
        options = [text(row, column).strip() for column in (self.right, *self.wrong)]
        order = list(range(len(options)))
        random.Random(f"{seed}/{text(row, self.question)}").shuffle(order)
        return [options[i] for i in order], order.index(0)


# --- answers; None: this row has none


@dataclass(frozen=True)
class Answer:
    """An answer in a column of its own: a string, a number, or a list of several that are wanted together."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> str | None:
        value = cell(row, self.column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):  # what pandas makes of a missing number
                raise BadCell(self.column, f"is {value}", "Fill it in, or drop such rows with --skip-bad.")
            return str(value)
        if isinstance(value, list):
            return answers.join(texts(row, self.column))
        return answers.normalise(text(row, self.column))


@dataclass(frozen=True)
class LastBox:
    r"""The last `\boxed{}` of a solution.

    Attributes:
        or_whole: longest text, in characters, that without a box is taken as the answer itself.
    """

    column: str
    or_whole: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> str | None:
        solution = text(row, self.column)
        if (answer := answers.of_solution(solution)) is not None:
            return answers.normalise(answer)
        short = solution.strip()
        return answers.normalise(short) if len(short) <= self.or_whole and "\n" not in short else None


@dataclass(frozen=True)
class FirstOf:
    """The answer by the first of several rules whose columns the row has."""

    rules: tuple[Answer | LastBox, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("|".join(column for rule in self.rules for column in rule.columns),)

    def __call__(self, row: dict[str, Any]) -> str | None:
        rule = next((rule for rule in self.rules if all(c.split(".")[0] in row for c in rule.columns)), self.rules[-1])
        return rule(row)


@dataclass(frozen=True)
class After:
    """The text behind the last marker (`#### n`)."""

    column: str
    marker: str = "####"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> str | None:
        _, found, answer = text(row, self.column).rpartition(self.marker)
        return answers.normalise(answer) if found else None


# --- demonstrations


@dataclass(frozen=True)
class Demos:
    """Demonstrations in one or several columns: a string, a list of strings, or a conversation (its last turn).

    Attributes:
        demos: the columns.
        all_of, any_of: aligned lists of flags (or one flag for the row); a demonstration is taken if all of the first
            and at least one of the second hold. A null flag does not hold.
        correct: column of aligned flags that only mark.
    """

    demos: tuple[str, ...]
    all_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    correct: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.demos, *self.all_of, *self.any_of, *((self.correct,) if self.correct else ()))

    def __call__(self, row: dict[str, Any]) -> list[Demonstration]:
        found = [text for column in self.demos for text in _demonstrations(row, column)]
        marks: list[bool | None] = [None] * len(found)
        if self.correct:
            marks = _flags(row, self.correct, len(found))
        if not (self.all_of or self.any_of):
            return [_demonstration(text, mark) for text, mark in zip(found, marks, strict=True)]
        every = [_flags(row, column, len(found)) for column in self.all_of]
        some = [_flags(row, column, len(found)) for column in self.any_of]
        taken = []
        for i, demonstration in enumerate(found):
            holds = all(flags[i] for flags in every) and (not some or any(flags[i] for flags in some))
            reason = None if holds else "the source's own flags do not hold"
            taken.append(_demonstration(demonstration, bool(holds), reason))
        return taken


def _demonstration(text: str | None, correct: bool | None, rejected: str | None = None) -> Demonstration:
    if text is None:
        return Demonstration("", correct, rejected=rejected or "null")
    return Demonstration(text, correct, rejected=rejected)


def _demonstrations(row: dict[str, Any], column: str) -> list[str | None]:
    value = cell(row, column)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        mend = "Write demonstrations as strings or lists of strings."
        raise BadCell(column, f"is {_shown(value)}, not a string or a list", mend)
    if value and isinstance(value[-1], dict):
        turn = _turn(value[-1], f"{column}[{len(value) - 1}]")
        if turn["role"] != "assistant":
            raise BadCell(column, f"ends in a turn of {turn['role']!r}", "The last turn has to be the assistant's.")
        return [turn["content"]]
    for position, item in enumerate(value):
        if item is not None and not isinstance(item, str):
            raise BadCell(f"{column}[{position}]", f"is {_shown(item)}, not a string", f"{_AS_STRINGS}.")
    return value


def _flags(row: dict[str, Any], column: str, count: int) -> list[bool | None]:
    value = cell(row, column)
    if value is None or isinstance(value, bool):
        return [value] * count
    if not isinstance(value, list) or not all(flag is None or isinstance(flag, bool) for flag in value):
        raise BadCell(column, f"is {_shown(value)}, not a list of booleans", "Write it as list<bool>.")
    if len(value) != count:
        raise BadCell(
            column,
            f"has {len(value)} flags for {count} demonstrations",
            "Give one flag for each, or drop such rows with --skip-bad.",
        )
    return value


@dataclass(frozen=True)
class ThinkThenAttempt:
    """The thinking and the answer in two columns, put together in think format."""

    thinking: str
    attempt: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.thinking, self.attempt)

    def __call__(self, row: dict[str, Any]) -> list[Demonstration]:
        parts = [_demonstrations(row, column) for column in self.columns]
        if not all(part and part[0] for part in parts):
            return [Demonstration("", rejected="null")]
        thinking, attempt = (part[0].strip() for part in parts)
        return [Demonstration(f"<think>\n{thinking}\n</think>\n\n{attempt}")]


@dataclass(frozen=True)
class Before:
    """The text before the last marker, with the answer behind it in a box, which is what the grader looks for."""

    column: str
    marker: str = "####"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> list[Demonstration]:
        worked, found, answer = text(row, self.column).rpartition(self.marker)
        if not found:
            return []
        return [Demonstration(f"{worked.rstrip()}\nThe answer is \\boxed{{{answer.strip()}}}.")]


@dataclass(frozen=True)
class Steps:
    """A demonstration given as a list of steps; joined as they are, the end of each kept."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, row: dict[str, Any]) -> list[Demonstration]:
        if cell(row, self.column) is None:
            return []
        ends, length = [], 0
        steps = texts(row, self.column)
        for step in steps:
            length += len(step)
            ends.append(length)
        return [Demonstration("".join(steps), steps=tuple(ends))] if steps else []
