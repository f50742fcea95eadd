"""`verl-prefix data`: sources to files that train at once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True, help="Convert demonstration and evaluation data to verl's parquet, and check it."
)
console = Console()

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Think(str, Enum):
    """What happens to the `<think>` at the start of a demonstration."""

    auto = "auto"
    keep = "keep"
    strip = "strip"


class Verify(str, Enum):
    """What the grader is for."""

    no = "no"
    mark = "mark"
    drop = "drop"


def _parquet(out: Path | None) -> Path | None:
    """Refuse a name that verl, which goes by the suffix, would not read as parquet."""
    if out is not None and out.suffix != ".parquet":
        raise typer.BadParameter(f"{out}: verl knows parquet by its suffix; name it NAME.parquet.")
    return out


@app.command("list")
def list_sources() -> None:
    """The sources and evaluation sets that have an entry."""
    from data_prep.sources import SOURCES

    table = Table("source", "hub", "licence", "notes")
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"
    for source in SOURCES.values():
        hub = f"{source.hub} {source.config or ''}".strip() if source.hub else "files only"
        note = f"evaluation, {source.note}" if source.evaluation else source.note
        table.add_row(source.name, hub, source.licence, note)
    console.print(table)


@app.command()
def convert(
    source: Annotated[
        str, typer.Option(help="Name of a source (see `list`), or path or glob of own files, or a hub id.")
    ],
    out: Annotated[Path, typer.Option(callback=_parquet, help="Parquet file to write; card and example go beside it.")],
    files: Annotated[
        list[str] | None,
        typer.Option("--from", help="Local files in the format of a named source (repeatable, globs)."),
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Own files: the question, or a list of messages.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Own files: the answer; a.b for a field.")] = None,
    demonstration_column: Annotated[
        str | None, typer.Option(help="Own files: text, list of texts or conversation.")
    ] = None,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="Own files: write an evaluation file.")] = False,
    split: Annotated[str | None, typer.Option(help="Split on the hub, instead of the source's own.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model to train: fills demos_tokens, decides --think auto.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Drop longer demonstrations (needs --tokenizer); 0 keeps all.")
    ] = 0,
    think: Annotated[
        Think,
        typer.Option(
            help="<think> at a demonstration's start: strip, keep, or strip if the chat template ends with it."
        ),
    ] = Think.auto,
    verify: Annotated[Verify, typer.Option(help="Grade every demonstration: mark or drop the wrong ones.")] = Verify.no,
    workers: Annotated[int, typer.Option(min=0, help="Grader processes; 0 takes one per core.")] = 0,
    require_demos: Annotated[
        bool, typer.Option("--require-demos", help="Drop rows left without demonstration.")
    ] = False,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep rows that repeat a question.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Drop rows with an unusable cell instead of stopping.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt, instead of any that is there.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Text behind every question, instead of the source's; '' for none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of shuffled options (GPQA).")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Read only so many rows, to try things out; 0 reads all.")] = 0,
) -> None:
    """Convert a source to one parquet file that verl and the plugin read."""
    from data_prep import convert as conversion
    from data_prep import reading

    with _told_errors():
        columns = (prompt_column, answer_column, demonstration_column)
        chosen, files = _choose(source, list(files or []), columns, evaluation, split)
        if files:
            shards = [reading.open_file(file) for file in reading.expand(files)]
        else:
            shards = [reading.open_hub(chosen.hub, chosen.config, chosen.split, gated=chosen.gated)]
        model = _tokenizer(tokenizer, max_tokens)
        options = conversion.Options(
            system=system,
            instruction=instruction,
            strip_opener=_strips(think, model),
            drop_wrong=verify is Verify.drop,
            max_tokens=max_tokens,
            keep_duplicates=keep_duplicates,
            require_demos=require_demos,
            skip_bad=skip_bad,
            seed=seed,
            limit=limit,
        )
        total = limit or reading.total_rows(shards)
        with _grader(verify, workers) as grade, _progress(f"converting {chosen.name}", total) as progress:
            report = conversion.convert(
                chosen, shards, out, options, grade=grade, count_tokens=_counter(model), progress=progress
            )
    _show(report, out)


@app.command()
def decontaminate(
    train: Annotated[Path, typer.Argument(help="Training file, as written by convert.")],
    against: Annotated[list[str], typer.Option(help="Evaluation files (repeatable, globs).")],
    ngram: Annotated[int, typer.Option(min=2, help="Words in a row that count as a match.")] = 13,
    drop: Annotated[bool, typer.Option("--drop", help="Write a copy without the matching rows to --out.")] = False,
    out: Annotated[Path | None, typer.Option(callback=_parquet, help="Where --drop writes to.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON lines to write, one per match.")] = None,
) -> None:
    """Report training prompts that are evaluation prompts, exactly or by a run of words."""
    from data_prep import decontaminate as contamination
    from data_prep import reading, writing

    if drop != (out is not None):
        raise typer.BadParameter("give --drop and --out together: the training file itself is left as it is.")
    with _told_errors():
        index = contamination.build_index(reading.expand(against), ngram)
        total = contamination.open_parquet(train).metadata.num_rows
        with _progress("comparing", total) as progress:
            rows, matches = contamination.decontaminate(train, index, out, progress)
        if report is not None:
            with writing.replacing(report) as (part,):
                part.write_text("".join(json.dumps(dataclasses.asdict(match)) + "\n" for match in matches))
    table = Table("evaluation file", "prompts", "training rows, exact", f"training rows, {ngram} words")
    for file, count in index.files.items():
        kinds = [match.kind for match in matches if match.evaluation_file == file]
        table.add_row(file, f"{count:,}", str(kinds.count("exact")), str(kinds.count("ngram")))
    console.print(table)
    kept = f"; {rows - len(matches):,} rows without them in {out}" if out else ""
    console.print(f"{len(matches):,} of {rows:,} training rows match{kept}", highlight=False, soft_wrap=True)


@app.command()
def sft(
    train: Annotated[Path, typer.Argument(help="Training file, as written by convert.")],
    out: Annotated[Path, typer.Option(callback=_parquet, help="Parquet file to write, with verl's column `messages`.")],
    first_only: Annotated[bool, typer.Option("--first-only", help="Only the first demonstration of each row.")] = False,
) -> None:
    """Export the demonstrations as conversations for verl's SFT trainer."""
    from data_prep import sft as sft_data
    from data_prep.decontaminate import open_parquet

    with _told_errors(), _progress("exporting", open_parquet(train).metadata.num_rows) as progress:
        written = sft_data.export(train, out, first_only=first_only, progress=progress)
    console.print(f"{written:,} conversations in {out}", highlight=False, soft_wrap=True)


def _choose(
    name: str, files: list[str], columns: tuple[str | None, str | None, str | None], evaluation: bool, split: str | None
) -> tuple[Any, list[str]]:
    """The source for --source, and the files to read: none where it comes from the hub.

    Raises:
        DataError: no such source or path, or a column is not given.
    """
    from data_prep import sources
    from data_prep.errors import DataError
    from data_prep.reading import SUFFIXES
    from data_prep.rules import Answer, Chat, Demos

    prompt, answer, demonstration = columns
    known = sources.find(name)
    if known is not None:
        if any(columns) or evaluation:
            mend = "Leave out --prompt-column, --answer-column, --demonstration-column and --evaluation."
            raise DataError(name, "is a named source, which brings its own columns", mend)
        if not files and known.hub is None:
            raise DataError(name, "is a format of files, not a data set on the hub", "Add --from FILES.")
        return (dataclasses.replace(known, split=split) if split else known), files
    looks_like_path = name.endswith(SUFFIXES) or os.path.exists(name) or name.startswith((".", "/", "~"))
    is_hub_id = bool(_HUB_ID.fullmatch(name)) and not looks_like_path and any(columns)
    if not looks_like_path and not is_hub_id:
        near = sources.near(name)
        meant = f"Did you mean {' or '.join(near)}? " if near else ""
        mend = f"{meant}`verl-prefix data list` shows all; own files are given by their path, with the columns' names."
        raise DataError(name, "is no source", mend)
    if not prompt or not answer:
        raise DataError(
            name,
            "is no named source, so its columns have to be named",
            "Add --prompt-column and --answer-column (and --demonstration-column); or, for a file in the format of a "
            "named source, --source NAME --from FILE.",
        )
    if files:
        raise DataError(name, "is a path already", "Give --from only with a named source.")
    made = sources.Source(
        name=name if is_hub_id else Path(name).name.split(".")[0].replace("*", ""),
        hub=name if is_hub_id else None,
        licence="see its card" if is_hub_id else "not known: the user's own file",
        prompt=Chat(prompt),
        answer=Answer(answer),
        demos=Demos((demonstration,)) if demonstration and not evaluation else None,
        split=split or "train",
        think=sources.open_think,
        evaluation=evaluation,
    )
    return made, [] if is_hub_id else [name]


def _tokenizer(path: str | None, max_tokens: int) -> Any:
    from data_prep import tokens

    if path is None and max_tokens:
        raise typer.BadParameter("--max-tokens needs --tokenizer to count with.")
    return tokens.load(path) if path else None


def _counter(tokenizer: Any) -> Callable[[list[str]], list[int]] | None:
    from data_prep import tokens

    return tokens.counter(tokenizer) if tokenizer is not None else None


def _strips(think: Think, tokenizer: Any) -> bool:
    from data_prep import tokens

    return think is Think.strip or (think is Think.auto and tokenizer is not None and tokens.opens_thinking(tokenizer))


@contextmanager
def _grader(verify: Verify, workers: int) -> Iterator[Callable[..., Any] | None]:
    """The grader's `map` for the block, or None."""
    if verify is Verify.no:
        yield None
        return
    from verl_prefix.grading.pool import GraderPool

    pool = GraderPool(workers=workers or os.cpu_count() or 1)
    try:
        yield pool.map
    finally:
        pool.close()


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda read: progress.update(task, completed=read)


@contextmanager
def _told_errors() -> Iterator[None]:
    """Errors made on purpose as one red paragraph and exit code 1; SIGTERM cleans up like Ctrl-C."""
    from verl_prefix.exceptions import PrefixError

    before = signal.signal(signal.SIGTERM, lambda number, frame: _stop(143))
    try:
        yield
    except PrefixError as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(code: int) -> None:
    raise SystemExit(code)


def _show(report: Any, out: Path) -> None:
    from data_prep.convert import beside

    table = Table("", "", show_header=False)
    table.add_row("rows", f"{report.written:,} of {report.read:,} read")
    if not report.source.evaluation:
        known = f", {report.right:,} right, {report.wrong:,} wrong" if report.right or report.wrong else ""
        table.add_row("demonstrations", f"{report.demos:,} in {report.rows_with_demos:,} rows{known}")
    for what, dropped in (("rows", report.rows_dropped), ("demonstrations", report.demos_dropped)):
        for reason, count in dropped.most_common():
            table.add_row(f"{what} dropped", f"{count:,}: {reason}")
    for what, values in report.percentiles().items():
        table.add_row(what, f"median {values[3]:,}, 95 % {values[4]:,}, longest {values[-1]:,}")
    shares = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in report.seconds.items() if what != "all")
    table.add_row("time", f"{report.seconds['all']:.1f} s{f' ({shares})' if shares else ''}")
    console.print(table)
    console.print(f"{out}, {beside(out, 'card.md').name}, {beside(out, 'example.json').name}", soft_wrap=True)


if __name__ == "__main__":
    app()
