"""What an evaluation has finished, on disk: `header.json` and one JSON object a line in `samples.jsonl`.

A line is written when a sample is complete, grade included, and a sample is asked for only if no line has it. So a
killed evaluation goes on where it stopped. A line cut short by the kill is removed, and its sample drawn again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_prefix.exceptions import EvaluationError

HEADER, SAMPLES = "header.json", "samples.jsonl"
#: of a sample: which it is
KEYS = ("problem", "sample")


class Store:
    """The output folder of one evaluation, locked against a second process while it is open.

    Attributes:
        finished: by (problem, sample), the records without an `error`.
        failed: those with one; a later run tries them again.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]):
        """Open `folder`, new or of an earlier run with the same header.

        Raises:
            EvaluationError: another process is writing there, it belongs to other arguments, or a line is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / SAMPLES).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise EvaluationError(
                f"{folder}: another evaluation is writing there. Wait for it or choose --out."
            ) from error
        self.finished: dict[tuple[str, int], dict[str, Any]] = {}
        self.failed: dict[tuple[str, int], dict[str, Any]] = {}
        try:
            _check_header(folder, json.loads(json.dumps(dict(header))))
            self._file.seek(0)
            self._load(folder / SAMPLES, self._file.read())
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, content: bytes) -> None:
        complete = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                record = json.loads(line)
                self._keep(record, tuple(record[key] for key in KEYS))
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(
                    f"{path}: line {number} is damaged ({type(error).__name__}: {error}). Delete that line; its "
                    "sample is drawn again."
                ) from error

    def _keep(self, record: dict[str, Any], key: tuple) -> None:
        self.failed.pop(key, None)
        (self.failed if "error" in record else self.finished)[key] = record

    def add(self, record: dict[str, Any]) -> None:
        """Append a sample and hand it to the operating system."""
        self._keep(record, tuple(record[key] for key in KEYS))
        self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_header(folder: Path, header: dict[str, Any]) -> None:
    path = folder / HEADER
    if not path.exists():
        if (folder / SAMPLES).stat().st_size:
            raise EvaluationError(f"{folder}: has {SAMPLES} without {HEADER}. Choose another --out or delete them.")
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(header, indent=2) + "\n")
        os.replace(beside, path)
        return
    there = json.loads(path.read_text())
    if different := list(_differences(there, header)):
        raise EvaluationError(
            f"{folder}: holds results of other arguments ({'; '.join(different)}). Give the same ones to go on, or "
            "another --out."
        )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            yield f"{key} was {there.get(key)!r} and is {here.get(key)!r}"
