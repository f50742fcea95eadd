"""The command `verl-prefix`: look at a run before it starts, while it goes on and after it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from data_prep.cli import app as data_app
from verl_prefix import cli_context, cli_doctor, cli_eval, cli_preview, cli_report, run_log

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command("preview")(cli_preview.command)
app.command("doctor")(cli_doctor.command)
app.command("extend-context")(cli_context.command)
app.command("compare")(cli_report.compare)
app.command("report")(cli_report.report)
app.command("eval")(cli_eval.command)
app.add_typer(data_app, name="data")
console = Console()

_TAIL_LINES = 40


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Folder with metrics.jsonl and console.log.")],
    steps: Annotated[int, typer.Option(help="Number of training steps of the run.")],
    pid: Annotated[int, typer.Option(help="Process to watch; its end ends the watching.")],
) -> None:
    """Follow a training run: its plugin lines, a progress bar, and each validation as it comes."""
    metrics, log = run / "metrics.jsonl", run / "console.log"
    shown_lines, shown_step, last_step = len(_plugin_lines(log)), -1, 0  # a resumed run's log has its earlier ones
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("starting Ray, FSDP2 and vLLM (1 to 2 min)", total=steps)
        alive = True
        while alive:
            alive = _alive(pid)
            lines = _plugin_lines(log)
            for line in lines[shown_lines:]:
                console.print(line, style="dim", highlight=False, markup=False)
            shown_lines = max(shown_lines, len(lines))
            for step, values in run_log.steps(metrics):
                if step > shown_step:
                    shown_step = step
                    last_step = max(last_step, step)
                    _print_validation(step, values)
                    progress.update(task, completed=step, description=_describe(values) or "training")
            if alive:
                time.sleep(1.0)
    if last_step < steps:
        console.print(f"[red]The run ended at step {last_step} of {steps}.[/red] Last lines of {log}:")
        for line in _lines(log)[-_TAIL_LINES:]:
            console.print(line[:300], highlight=False, markup=False)
        raise typer.Exit(1)


def _print_validation(step: int, values: dict[str, float]) -> None:
    found = {match["source"]: value for name, value in values.items() if (match := run_log.ACCURACY.match(name))}
    if found:
        console.print(
            f"step {step:>4}  " + "  ".join(f"{source} {value:.2f}" for source, value in sorted(found.items()))
        )


def _describe(values: dict[str, float]) -> str:
    parts = []
    for name, text in (("prefixed/reward", "prefixed"), ("on_policy/reward", "on-policy")):
        if name in values:
            parts.append(f"{text} {values[name]:.2f}")
    return "reward " + ", ".join(parts) if parts else ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _plugin_lines(file: Path) -> list[str]:
    return [line for line in _lines(file) if line.startswith("[verl_prefix")]


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.exists() else []


if __name__ == "__main__":
    app()
