"""The command `verl-prefix eval`: avg@k and pass@k of a checkpoint, with confidence intervals."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from verl_prefix.exceptions import EvaluationError, PrefixError
from verl_prefix.terminal import printable

if TYPE_CHECKING:
    from verl_prefix.evaluation import server as servers
    from verl_prefix.evaluation import store

_GRADER = "pkg://verl_prefix.reward"


def command(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="Parquet files of `verl-prefix data convert`.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder or id, or verl's global_step_N with merged weights.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for samples.jsonl and summary.json; goes on there.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of a vLLM server with that model; without it one is started.")
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Its model, if it serves several.")] = None,
    serve_args: Annotated[str, typer.Option(help='Of the server started here: "--data-parallel-size 8".')] = "",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples a problem.")] = 1,
    n_of: Annotated[list[str] | None, typer.Option(help="SET=N: another number for a data set (repeatable).")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a response.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of the samples (one seed each) and the bootstrap.")] = 0,
    grader: Annotated[str, typer.Option(help="FILE.py or pkg://MODULE, with :NAME if not compute_score.")] = _GRADER,
    grader_arg: Annotated[list[str] | None, typer.Option(help="KEY=VALUE: verl's reward_kwargs (repeatable).")] = None,
    chat_template: Annotated[str | None, typer.Option(help="verl's custom_chat_template: text, or a file.")] = None,
    template_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: verl's data.apply_chat_template_kwargs (repeatable).")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first rows of each file; 0: all.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 256,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one response, waiting included.")] = 3600,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    validation: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Instead: a run's trainer.validation_data_dir.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Which of its steps; the last one if not given.")] = None,
) -> None:
    """Sample, grade and count: avg@k and pass@k per data set, with bootstrap intervals over problems.

    A killed evaluation goes on with the same command. Exit code 1 if any sample could not be had or graded.
    """
    # not at the top: `doctor` has to start without NumPy
    from verl_prefix.evaluation import checkpoints, client, grading, store
    from verl_prefix.evaluation import problems as reading
    from verl_prefix.evaluation import server as servers
    from verl_prefix.evaluation import summary as report
    from verl_prefix.evaluation import validation as dumps

    console = Console(soft_wrap=True)
    try:
        if validation is None and not (files and model and out):
            raise EvaluationError("give FILE..., --model and --out, or --validation DIR.")
        tokenizer, problems = None, []
        if files:
            if not model:
                raise EvaluationError(
                    "--model is missing: its tokenizer tells which data set a prompt of the dump is of."
                )
            model = checkpoints.resolve(model)
            tokenizer = _tokenizer(model, chat_template, trust_remote_code)
            problems = reading.read(files, tokenizer, template=_pairs("--template-arg", template_arg), limit=limit)
        failed: list[dict[str, Any]] = []
        if validation is not None:
            if out is not None and (out / store.HEADER).exists():
                raise EvaluationError(f"--out {out}: holds an evaluation of its own. Choose another folder.")
            dump = dumps.latest(validation, step)
            console.print(f"verl's validation, {dump}", markup=False, highlight=False)
            records = dumps.read(dump, problems, tokenizer)
            plan = report.planned(records, problems)
        else:
            samples = reading.samples_of(problems, n, n_of or [])
            plan = {name: (sum(p.data_source == name for p in problems), count) for name, count in samples.items()}
            sampling = client.Sampling(temperature, top_p, max_tokens, seed)
            grader_args = _pairs("--grader-arg", grader_arg)
            grade = grading.load(grader, grader_args)
            header = {
                "model": model,
                "weights": checkpoints.fingerprint(model),
                "problems": reading.digest(problems),
                "samples": samples,
                **dataclasses.asdict(sampling),
                "grader": [grader, grader_args],
            }
            with store.Store(out, header) as kept:
                todo = [
                    (p, i) for p in problems for i in range(samples[p.data_source]) if (p.key, i) not in kept.finished
                ]
                if todo:
                    if len(kept.finished):
                        console.print(f"{len(kept.finished):,} samples are there, {len(todo):,} to go", highlight=False)
                    with _server(console, model, server, served_name, serve_args, trust_remote_code, out) as found:
                        if warning := servers.check(found, problems, tokenizer, max_tokens):
                            console.print(f"warning {warning}", markup=False, highlight=False)
                        with _progress(console, kept, plan) as done:
                            client.run(
                                found, todo, kept, grade, sampling, concurrency=concurrency, timeout=timeout, done=done
                            )
                records, failed = list(kept.finished.values()), list(kept.failed.values())
    except PrefixError as error:
        console.print(Text.assemble(("error ", "bold red"), printable(str(error))))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("stopped; finished samples are kept, the same command goes on")
        raise typer.Exit(130) from None
    summary = report.summarise(records, plan, seed=seed)
    console.print(report.table(summary))
    console.print(f"In per cent, with {summary['interval']}.", highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        console.print(f"{out / 'summary.json'}", markup=False, highlight=False)
    missing = sum(of["not_graded"] for of in summary["sets"].values())
    if missing:
        example = f", e.g. {failed[0]['problem']}: {failed[0]['error']}" if failed else ""
        text = f"{missing:,} samples have no grade and are in no estimate{example}"
        mend = ". The same command tries them again." if failed else " (rollouts that failed in verl)."
        console.print(Text.assemble(("warning ", "yellow"), printable(text + mend)))
        raise typer.Exit(1)


def _tokenizer(model: str, chat_template: str | None, trust_remote_code: bool) -> Any:
    from verl_prefix import tokenizers

    tokenizer = tokenizers.load(model, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        file = Path(chat_template)
        is_file = len(chat_template) < 256 and file.is_file()
        tokenizer.chat_template = file.read_text() if is_file else chat_template
    return tokenizer


def _pairs(option: str, entries: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE entries; values as YAML, like verl's overrides."""
    import yaml

    pairs = {}
    for entry in entries or []:
        key, equals, value = entry.partition("=")
        if not equals:
            raise EvaluationError(f"{option} {entry}: write KEY=VALUE.")
        pairs[key] = yaml.safe_load(value)
    return pairs


@contextmanager
def _server(
    console: Console, model: str, url: str | None, name: str | None, arguments: str, remote_code: bool, out: Path
) -> Iterator[servers.Server]:
    from verl_prefix.evaluation import server as servers

    if url is not None:
        yield servers.find(url, name)
        return
    log = out / "server.log"
    more = [*shlex.split(arguments), *(["--trust-remote-code"] if remote_code else [])]
    with ExitStack() as stack:
        with console.status(f"starting vLLM ({log})"):
            found = stack.enter_context(servers.local(model, more, log))
        yield found


@contextmanager
def _progress(
    console: Console, kept: store.Store, plan: dict[str, tuple[int, int]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar per data set with its accuracy so far; gives the function that takes each new record."""
    there = Counter(record["data_source"] for record in kept.finished.values())
    right = Counter(record["data_source"] for record in kept.finished.values() if record["correct"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bars = {
            name: progress.add_task(printable(name), total=problems * count, completed=there[name], status="")
            for name, (problems, count) in plan.items()
        }

        def done(record: dict[str, Any]) -> None:
            name = record["data_source"]
            there[name] += "error" not in record
            right[name] += record.get("correct", False)
            status = f"{right[name] / there[name]:.1%}" if there[name] else ""
            progress.update(bars[name], advance=1, status=status)

        yield done
