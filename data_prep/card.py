"""What a conversion did: counts, lengths, what was dropped and why; and the data card that says so."""

from __future__ import annotations

import datetime
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources import Source

_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_PLACES = 3
Place = tuple[str, int]


@dataclass
class Report:
    """Counts of a conversion.

    Attributes:
        source: the entry it went by.
        files: names of the files read.
        verified: whether the grader has seen the demonstrations.
        strip_opener: whether `<think>` was taken off their start.
        read, written: rows.
        demos, rows_with_demos: demonstrations in the output, and rows that have any.
        right, wrong: demonstrations in the output that are known to be so.
        rows_dropped, demos_dropped: how many for each reason.
        grades: how often the grader gave each reason.
        places: the first places of each reason.
        seconds: wall time of `grading`, `tokenising` and `all`.
        example: the first row written.
    """

    source: Source
    files: Sequence[str]
    verified: bool = False
    strip_opener: bool = False
    read: int = 0
    written: int = 0
    demos: int = 0
    rows_with_demos: int = 0
    right: int = 0
    wrong: int = 0
    rows_dropped: Counter = field(default_factory=Counter)
    demos_dropped: Counter = field(default_factory=Counter)
    grades: Counter = field(default_factory=Counter)
    places: dict[str, list[Place]] = field(default_factory=dict)
    lengths: dict[str, array] = field(default_factory=dict)
    seconds: Counter = field(default_factory=Counter)
    example: dict[str, Any] | None = None

    def drop_row(self, reason: str, place: Place) -> None:
        self.rows_dropped[reason] += 1
        self._remember(reason, place)

    def drop_demo(self, reason: str, place: Place) -> None:
        self.demos_dropped[reason] += 1
        self._remember(reason, place)

    def graded(self, reason: str, correct: bool, place: Place) -> None:
        self.grades[reason] += 1
        if not correct:
            self._remember(f"graded: {reason}", place)

    def _remember(self, reason: str, place: Place) -> None:
        places = self.places.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(place)

    def wrote(self, rows: list[dict[str, Any]]) -> None:
        if rows and self.example is None:
            self.example = rows[0]
        self.written += len(rows)
        self._lengths("prompt, characters", (sum(len(m["content"]) for m in row["prompt"]) for row in rows))
        if self.source.evaluation:
            return
        self._lengths("demonstration, characters", (len(demo) for row in rows for demo in row["demos"]))
        self._lengths("demonstration, tokens", (count for row in rows for count in row["demos_tokens"]))
        for row in rows:
            self.demos += len(row["demos"])
            self.rows_with_demos += bool(row["demos"])
            self.right += row["demos_correct"].count(True)
            self.wrong += row["demos_correct"].count(False)

    def _lengths(self, what: str, lengths: Any) -> None:
        self.lengths.setdefault(what, array("I")).extend(lengths)

    def percentiles(self) -> dict[str, list[int]]:
        """For each length measured its percentiles (5, 25, 50, 75, 95, 99, 100)."""
        found = {}
        for what, lengths in self.lengths.items():
            if lengths:
                values = np.percentile(np.frombuffer(lengths, dtype=np.uint32), _PERCENTILES, method="nearest")
                found[what] = [int(value) for value in values]
        return found


def write_card(file: Path, name: str, report: Report) -> None:
    """The data card, as Markdown."""
    source = report.source
    origin = source.hub or "local file"
    lines = [
        f"# {name}",
        "",
        f"Converted by `verl-prefix data convert` ({_version('verl_prefix')}) on "
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC.",
        "",
        f"- source: `{source.name}` ({origin}{f', config {source.config}' if source.config else ''}, "
        f"split {source.split})",
        f"- licence of the source: {source.licence}",
        f"- kind: {'evaluation, no demonstrations' if source.evaluation else 'training'}",
        f"- read from: {_listed(report.files)}",
        "",
        "| | |",
        "| --- | ---: |",
        *(f"| {what} | {count:,} |" for what, count in _counts(report)),
        "",
    ]
    if percentiles := report.percentiles():
        lines += ["| length, percentile | " + " | ".join(map(str, _PERCENTILES)) + " |"]
        lines += ["| --- |" + " ---: |" * len(_PERCENTILES)]
        lines += [f"| {what} | " + " | ".join(f"{n:,}" for n in row) + " |" for what, row in percentiles.items()]
        lines.append("")
    lines += _dropped(report)
    if not source.evaluation:
        lines += ["## Demonstrations", "", *_about_demonstrations(report), ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _counts(report: Report) -> list[tuple[str, int]]:
    counts = [("rows read", report.read), ("rows written", report.written)]
    if not report.source.evaluation:
        counts += [("rows with a demonstration", report.rows_with_demos), ("demonstrations", report.demos)]
        if report.right or report.wrong:
            counts += [("of them right", report.right), ("of them wrong", report.wrong)]
    return counts


def _dropped(report: Report) -> list[str]:
    lines = ["## What was dropped", ""]
    for what, dropped in (("row", report.rows_dropped), ("demonstration", report.demos_dropped)):
        for reason, count in dropped.most_common():
            places = ", ".join(f"{Path(file).name} row {row}" for file, row in report.places[reason])
            lines.append(f"- {count:,} {what}{'s' if count != 1 else ''}: {reason} (first: {places})")
    return [*(lines if len(lines) > 2 else [*lines, "Nothing."]), ""]


def _about_demonstrations(report: Report) -> list[str]:
    think = (
        "`<think>` is not at the start, because the prompt ends with it"
        if report.strip_opener
        else ("thinking, where there is any, stands between `<think>` and `</think>`")
    )
    lines = [f"- think format: {think}"]
    if report.verified:
        lines.append(
            "- verified with `verl_prefix`'s grader: " + _listed(f"{n:,} {r}" for r, n in report.grades.items())
        )
    elif report.right or report.wrong:
        lines.append("- correctness: as the source states it, not verified here")
    else:
        lines.append("- correctness: nobody has looked")
    return lines


def _listed(names: Any, most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
