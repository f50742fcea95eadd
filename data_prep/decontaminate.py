"""Training prompts that are evaluation prompts: the same text after normalisation, or a run of words in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import writing
from data_prep.errors import DataError
from data_prep.sources import unwrap

#: a run of words that so many different evaluation prompts share is a figure of speech, not a leak
_FIGURE_OF_SPEECH = 10
_WORD = re.compile(r"\w+")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[,;:! ]|[\s$~]+")


def exact_key(question: str) -> str:
    r"""A question without case, spacing (`\,`, `\left` and `$` too) and the stop at its end."""
    return _SPACING.sub("", question.lower()).rstrip(".?!:")


def words(question: str) -> list[str]:
    return _WORD.findall(question.lower())


def ngrams(question: str, n: int) -> set[str]:
    """Runs of `n` words; none if there are fewer."""
    found = words(question)
    return {" ".join(found[i : i + n]) for i in range(len(found) - n + 1)}


@dataclass(frozen=True)
class Match:
    """A training row that matches an evaluation row. kind: `exact` or `ngram`; the row numbers are 0-based."""

    train_row: int
    train_index: Any
    evaluation_file: str
    evaluation_row: int
    kind: str


@dataclass
class EvaluationIndex:
    """Questions of the evaluation files, by exact key and by hashed run of words."""

    n: int
    files: dict[str, int] = field(default_factory=dict)
    _exact: dict[str, tuple[str, int]] = field(default_factory=dict)
    _grams: dict[int, tuple[str, int]] = field(default_factory=dict)
    _shared: Counter = field(default_factory=Counter)

    def add(self, file: str, questions: Iterator[str]) -> None:
        self.files.setdefault(file, 0)
        for row, question in enumerate(questions):
            self.files[file] += 1
            exact = exact_key(question)
            if exact in self._exact:  # a file repeated for avg@k does not make its words a figure of speech
                continue
            self._exact[exact] = (file, row)
            for gram in ngrams(question, self.n):
                key = hash(gram)
                if key in self._grams:
                    self._shared[key] += 1
                else:
                    self._grams[key] = (file, row)

    def find(self, question: str) -> tuple[str, int, str] | None:
        """(evaluation file, row, kind) of the first match."""
        if (place := self._exact.get(exact_key(question))) is not None:
            return (*place, "exact")
        for gram in sorted(ngrams(question, self.n)):
            key = hash(gram)
            if key in self._grams and self._shared[key] < _FIGURE_OF_SPEECH - 1:
                return (*self._grams[key], "ngram")
        return None


def questions(file: Path, batches: Iterator[Any]) -> Iterator[list[str]]:
    """The questions of the batches of a file that verl reads: `extra_info.question`, or the last user turn."""
    first = 0
    for batch in batches:
        listed = []
        for offset, row in enumerate(batch.select(_question_columns(batch.schema.names, file)).to_pylist()):
            question = (row.get("extra_info") or {}).get("question")
            if not isinstance(question, str):
                question = _last_turn(row.get("prompt"), file, first + offset)
            listed.append(question)
        yield listed
        first += batch.num_rows


def _question_columns(names: Sequence[str], file: Path) -> list[str]:
    if "prompt" not in names:
        raise DataError(file, "is missing", "Convert the file first (verl-prefix data convert).", column="prompt")
    return [name for name in ("prompt", "extra_info") if name in names]


def _last_turn(prompt: Any, file: Path, row: int) -> str:
    if isinstance(prompt, str):
        return unwrap(prompt)
    if (
        isinstance(prompt, list)
        and prompt
        and isinstance(prompt[-1], dict)
        and isinstance(prompt[-1].get("content"), str)
    ):
        return unwrap(prompt[-1]["content"])
    raise DataError(
        file, "is not a list of messages", "Convert the file first (verl-prefix data convert).", row, "prompt"
    )


def open_parquet(file: Path) -> Any:
    """The file as a `ParquetFile`.

    Raises:
        DataError: it is missing or not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.exists():
        raise DataError(file, "does not exist", "Check the path.")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        mend = "Give a parquet file that verl-prefix data convert wrote; write it again if it was cut off."
        raise DataError(file, "is not a readable parquet file", mend) from error


def build_index(evaluation_files: Sequence[Path], n: int) -> EvaluationIndex:
    """Index of all questions of the evaluation files."""
    index = EvaluationIndex(n)
    for file in evaluation_files:
        batches = open_parquet(file).iter_batches(batch_size=1024)
        index.add(file.name, (question for listed in questions(file, batches) for question in listed))
    return index


def decontaminate(
    train: Path,
    index: EvaluationIndex,
    out: Path | None = None,
    progress: Callable[[int], None] = lambda read: None,
) -> tuple[int, list[Match]]:
    """Rows of `train` and those of them that match. With `out`, a copy without these is written there, streaming.

    Raises:
        DataError: a file cannot be read, or every row matches. An earlier `out` is untouched.
    """
    parquet = open_parquet(train)
    if out is None:
        matches: list[Match] = []
        for _ in _scan(train, parquet, index, matches, progress, ["prompt", "extra_info"]):
            pass
        return parquet.metadata.num_rows, matches
    import pyarrow as pa

    matches = []
    with writing.replacing(out) as (part,), writing.parquet(part, parquet.schema_arrow) as sink:
        for batch, clean in _scan(train, parquet, index, matches, progress, None):
            sink.batch(batch.filter(pa.array(clean)))
        if matches and len(matches) == parquet.metadata.num_rows:
            raise DataError(train, "has no row that is in no evaluation file", "Check which files were given as which.")
    return parquet.metadata.num_rows, matches


def _scan(
    train: Path,
    parquet: Any,
    index: EvaluationIndex,
    matches: list[Match],
    progress: Callable[[int], None],
    columns: list[str] | None,
) -> Iterator[tuple[Any, list[bool]]]:
    """Batches with a mask of the rows that match nothing; the matches are appended to `matches`."""
    names = parquet.schema_arrow.names
    read = 0
    batches = parquet.iter_batches(batch_size=512, columns=[c for c in columns if c in names] if columns else None)
    for batch in batches:
        listed = next(questions(train, iter([batch])))
        numbers = _indices(batch)
        clean = []
        for offset, question in enumerate(listed):
            found = index.find(question)
            clean.append(found is None)
            if found is not None:
                matches.append(Match(read + offset, numbers[offset], *found))
        read += batch.num_rows
        progress(read)
        yield batch, clean


def _indices(batch: Any) -> list[Any]:
    if "extra_info" not in batch.schema.names:
        return [None] * batch.num_rows
    return [(info or {}).get("index") for info in batch.column("extra_info").to_pylist()]
