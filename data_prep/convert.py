"""From a source's rows to verl's parquet: one streaming pass, the same for every source."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import reading, rows, writing
from data_prep.card import Report, write_card
from data_prep.errors import BadCell, DataError
from data_prep.reading import Shard
from data_prep.rules import Demonstration, cell
from data_prep.sources import Source, unwrap
from verl_prefix.grading.answers import after_thinking

#: pairs (response, answer) -> a grade with `.score` and `.reason` each, in order
Grade = Callable[[Iterable[tuple[str, str]]], Iterable[Any]]
#: texts -> number of tokens of each
CountTokens = Callable[[list[str]], list[int]]

THINK_OPENER = "<think>"


@dataclass(frozen=True)
class Options:
    """What the user decides.

    Attributes:
        system: system prompt to put before every prompt, instead of one that is there.
        instruction: text behind every question, instead of the source's own; not used where the source brings messages.
        strip_opener: take `<think>` off the start of demonstrations, because the chat template opens it.
        drop_wrong: drop demonstrations known to be wrong instead of marking them.
        max_chars: longest demonstration kept, in characters; longer ones fit no response limit.
        max_tokens: longest demonstration kept, in tokens; 0 keeps all.
        keep_duplicates: keep rows whose question was there before. Evaluation sets always keep theirs.
        require_demos: drop rows that are left without a demonstration.
        skip_bad: drop rows with a cell that cannot be used instead of stopping.
        seed: of the order of shuffled options.
        limit: stop after so many rows of the source; 0 reads all.
    """

    system: str | None = None
    instruction: str | None = None
    strip_opener: bool = False
    drop_wrong: bool = False
    max_chars: int = 1_000_000
    max_tokens: int = 0
    keep_duplicates: bool = False
    require_demos: bool = False
    skip_bad: bool = False
    seed: int = 0
    limit: int = 0


class Draft(NamedTuple):
    """A row on its way: what goes to the file, its place in the source, and its demonstrations."""

    row: dict[str, Any]
    place: tuple[str, int]
    demos: list[Demonstration]


@dataclass
class Converter:
    """The steps of a conversion; `report` counts what they did.

    `grade` and `count_tokens` are None where the user did not ask for them.
    """

    source: Source
    options: Options
    report: Report
    grade: Grade | None = None
    count_tokens: CountTokens | None = None
    _seen: set[bytes] = field(default_factory=set)
    _answer_type: tuple[type, str, int] | None = None
    _first_index: int | None = None

    def batch(self, shard: str, first: int, raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Finished rows for a batch of raw ones."""
        drafts = [draft for at, row in enumerate(raw, first) if (draft := self._draft(row, (shard, at))) is not None]
        if self.source.evaluation:
            finished = drafts
        else:
            self._grade(drafts)
            self._count_tokens(drafts)
            finished = [draft for draft in drafts if self._finish(draft)]
        self._number(finished)
        done = [draft.row for draft in finished]
        rows.check(done, [draft.place for draft in finished], evaluation=self.source.evaluation)
        self.report.wrote(done)
        return done

    def _draft(self, raw: dict[str, Any], place: tuple[str, int]) -> Draft | None:
        self.report.read += 1
        try:
            return self._convert(raw, place)
        except BadCell as bad:
            if not self.options.skip_bad:
                raise DataError(place[0], bad.problem, bad.mend, place[1], bad.column) from None
            self.report.drop_row(f"unusable cell in {bad.column.split('[')[0]}", place)
            return None

    def _convert(self, raw: dict[str, Any], place: tuple[str, int]) -> Draft | None:
        source, options = self.source, self.options
        prompt = source.prompt(raw)
        question = prompt if isinstance(prompt, str) else unwrap(prompt[-1]["content"])
        if self._first_index is None:
            self._first_index = rows.first_index(source.name, question)
        shown = question
        if source.options is not None:
            choices, right = source.options(raw, options.seed)
            answer: str | None = chr(ord("A") + right)
            shown += "\n" + "".join(f"\n{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
        else:
            self._refuse_mixed_answers(raw, place)
            answer = source.answer(raw)
        if not answer:
            self.report.drop_row("no answer", place)
            return None
        if not source.evaluation and not options.keep_duplicates and not self._is_new(question):
            self.report.drop_row("its question was there before", place)
            return None
        row = {
            "data_source": self._own(raw, "data_source") or source.name,
            "prompt": self._messages(prompt, shown),
            "ability": self._own(raw, "ability") or source.ability,
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {
                "index": -1,
                "split": "test" if source.evaluation else "train",
                "row": place[1],
                "question": question,
            },
        }
        if source.evaluation:
            return Draft(row, place, [])
        row["solution"] = (self._own(raw, source.solution) if source.solution else None) or ""
        return Draft(row, place, self._usable(source.demonstrations(raw), place))

    def _own(self, raw: dict[str, Any], column: str) -> str | None:
        """A text that the source may bring; None where it does not."""
        value = raw.get(column)
        return value if isinstance(value, str) and value else None

    def _messages(self, prompt: str | list[dict[str, str]], shown: str) -> list[dict[str, str]]:
        if isinstance(prompt, str) or self.source.rewrite:
            instruction = self.source.instruction if self.options.instruction is None else self.options.instruction
            messages = [{"role": "user", "content": f"{shown}\n\n{instruction}" if instruction else shown}]
        else:
            messages = prompt
        if self.options.system is None:
            return messages
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.options.system}, *rest]

    def _is_new(self, question: str) -> bool:
        text = " ".join(question.lower().split()).encode()
        key = hashlib.blake2b(text, digest_size=16).digest()
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _refuse_mixed_answers(self, raw: dict[str, Any], place: tuple[str, int]) -> None:
        """Strings in one shard and numbers in another: the same answer would be written in two ways (7, "7.0")."""
        column = self.source.answer.columns[0]
        if "|" in column:
            return
        value = cell(raw, column)
        if value is None or value != value:  # null, NaN
            return
        kind = float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)
        if self._answer_type is None:
            self._answer_type = (kind, *place)
        elif kind is not self._answer_type[0]:
            before, file, row = self._answer_type
            words = {float: "a number", str: "a string", list: "a list"}
            raise DataError(
                place[0],
                f"is {words.get(kind, kind.__name__)}, but {words.get(before, before.__name__)} in {file} row {row}",
                "Write the column with one type in all files.",
                place[1],
                column,
            )

    def _usable(self, demos: list[Demonstration], place: tuple[str, int]) -> list[Demonstration]:
        kept = []
        for demo in demos:
            text = demo.text
            if self.options.strip_opener and text.startswith(THINK_OPENER):
                text = text[len(THINK_OPENER) :].lstrip("\n")
                cut = len(demo.text) - len(text)
                demo = demo._replace(text=text, steps=tuple(max(0, end - cut) for end in demo.steps))
            reason = demo.rejected
            if reason is None and not text.strip():
                reason = "empty"
            if reason is None and len(text) > self.options.max_chars:
                reason = f"longer than {self.options.max_chars:,} characters"
            if reason is None:
                kept.append(demo)
            else:
                self.report.drop_demo(reason, place)
        return kept

    def _grade(self, drafts: Sequence[Draft]) -> None:
        """Replace what is said about the demonstrations by what the grader finds."""
        if self.grade is None:
            return
        began = time.perf_counter()
        pairs = [
            (_response(demo.text), draft.row["reward_model"]["ground_truth"])
            for draft in drafts
            for demo in draft.demos
        ]
        grades = iter(self.grade(pairs))
        for draft in drafts:
            for position, demo in enumerate(draft.demos):
                grade = next(grades)
                correct = grade.score > 0
                self.report.graded(str(grade.reason), correct, draft.place)
                draft.demos[position] = demo._replace(correct=correct)
        self.report.seconds["grading"] += time.perf_counter() - began

    def _count_tokens(self, drafts: Sequence[Draft]) -> None:
        if self.count_tokens is None:
            return
        began = time.perf_counter()
        counts = iter(self.count_tokens([demo.text for draft in drafts for demo in draft.demos]))
        for draft in drafts:
            draft.demos[:] = [demo._replace(tokens=next(counts)) for demo in draft.demos]
        self.report.seconds["tokenising"] += time.perf_counter() - began

    def _finish(self, draft: Draft) -> bool:
        """Fill the demonstration columns; False drops the row."""
        limit, demos = self.options.max_tokens, []
        for demo in draft.demos:
            if self.options.drop_wrong and demo.correct is False:
                self.report.drop_demo("wrong", draft.place)
            elif limit and demo.tokens is not None and demo.tokens > limit:
                self.report.drop_demo(f"longer than {limit:,} tokens", draft.place)
            else:
                demos.append(demo)
        if not demos and self.options.require_demos:
            self.report.drop_row("no demonstration is left", draft.place)
            return False
        marks, tokens = [demo.correct for demo in demos], [demo.tokens for demo in demos]
        draft.row.update(
            demos=[demo.text for demo in demos],
            demos_correct=[] if None in marks else marks,
            demos_tokens=[] if None in tokens else tokens,
            demos_steps=[list(demo.steps) for demo in demos],
        )
        return True

    def _number(self, drafts: list[Draft]) -> None:
        first = (self._first_index or 0) + self.report.written
        for offset, draft in enumerate(drafts):
            draft.row["extra_info"]["index"] = first + offset


def _response(demo: str) -> str:
    """What of a demonstration counts as its answer: where it thinks, what follows, as in the grader's think format."""
    if THINK_OPENER not in demo and "</think>" not in demo:
        return demo
    return after_thinking(demo) or ""


def convert(
    source: Source,
    shards: Sequence[Shard],
    out: Path,
    options: Options,
    *,
    grade: Grade | None = None,
    count_tokens: CountTokens | None = None,
    progress: Callable[[int], None] = lambda read: None,
) -> Report:
    """Write `out` (parquet), `*_example.json` and `*_card.md` beside it. All three appear together, at the end.

    Args:
        source: what is where in the rows.
        shards: files of the source, or its stream from the hub.
        out: parquet file to write; replaced if it is there.
        options: the user's decisions.
        grade: the grader, to verify demonstrations with.
        count_tokens: the tokenizer, to store lengths with.
        progress: called with the number of rows read so far.

    Raises:
        DataError: bad input, no row or no demonstration left, or the disk is full. Earlier output is untouched.
    """
    _check_columns(source, shards)
    report = Report(
        source=source,
        files=[shard.name for shard in shards],
        verified=grade is not None,
        strip_opener=options.strip_opener,
    )
    converter = Converter(source, options, report, grade, count_tokens)
    example, card = beside(out, "example.json"), beside(out, "card.md")
    schema = rows.features(evaluation=source.evaluation).arrow_schema
    began = time.perf_counter()
    # the parquet last: a reader who sees it sees the card and the example of the same run
    with _no_cycle_search(), writing.replacing(card, example, out) as (card_part, example_part, out_part):
        with writing.parquet(out_part, schema) as sink:
            for shard, first, raw in _limited(reading.read(shards, source.wanted), options.limit):
                sink.rows(converter.batch(shard.name, first, raw))
                progress(report.read)
        report.seconds["all"] = time.perf_counter() - began
        _refuse_nothing(report, source, shards)
        example_part.write_text(json.dumps(report.example, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_card(card_part, out.name, report)
    return report


@contextmanager
def _no_cycle_search() -> Iterator[None]:
    """Python's search for reference cycles off: rows are trees, and it would walk all of them over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def beside(out: Path, ending: str) -> Path:
    """`NAME_ending` beside `NAME.parquet`."""
    return out.with_name(f"{out.stem}_{ending}")


def _check_columns(source: Source, shards: Sequence[Shard]) -> None:
    for shard in shards:
        lacking = reading.missing(shard, source.columns) if shard.columns is not None else []
        if lacking:
            raise DataError(
                shard.name,
                f"is missing; {source.name} needs {', '.join(map(repr, source.columns))}, the file has "
                f"{', '.join(map(repr, shard.columns or []))}",
                "Name the file's columns with --prompt-column, --answer-column and --demonstration-column, or choose "
                "the --source it was made for.",
                column=lacking[0],
            )


def _limited(batches: Iterator[Any], limit: int) -> Iterator[Any]:
    left = limit
    for shard, first, raw in batches:
        yield shard, first, raw[:left] if limit else raw
        left -= len(raw)
        if limit and left <= 0:
            return


def _refuse_nothing(report: Report, source: Source, shards: Sequence[Shard]) -> None:
    """A file without rows, or without demonstrations where the source has them, is a mistake to be told now."""
    where = ", ".join(shard.name for shard in shards[:3])
    why = "; ".join(f"{count} x {reason}" for reason, count in (report.rows_dropped + report.demos_dropped).items())
    if not report.written:
        raise DataError(
            where, f"none of the {report.read} rows is left ({why or 'there are none'})", "Mend the source."
        )
    if source.demos is not None and not source.evaluation and not report.demos:
        raise DataError(
            where,
            f"none of the {report.written} rows has a usable demonstration ({why or 'every cell is empty'})",
            "Fill the column, name another with --demonstration-column, or leave that out for data without any.",
            column=source.demos.columns[0],
        )
